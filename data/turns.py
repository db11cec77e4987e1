"""What a row says, in whichever format: which format it is in, its turns, their roles, and the system turn."""

from typing import Any, Literal

from shortzip.data.columns import SYSTEM, is_empty, refused_key
from shortzip.data.json_rows import MalformedRow
from shortzip.data.row_values import check_text, found_in_words, malformed

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}

InstructionFormat = Literal["llava", "messages"]


def format_of(row: Any) -> InstructionFormat | None:
    """Which format a row is in; None if it fits none, or has no turn to tell it by."""
    turns = given_turns(row)
    first = next((turn for turn in turns if isinstance(turn, dict) and turn), {})
    if {"from", "value"} <= first.keys():
        return "llava"
    return "messages" if {"role", "content"} <= first.keys() else None


def given_turns(row: Any) -> list[Any]:
    """What a row has as turns, under any of the names; nothing where it has no list of them."""
    if not isinstance(row, dict):
        return []
    if _is_prompt_and_completion(row):
        return _spoken(row["prompt"], "user") + _spoken(row["completion"], "assistant")
    turns = row.get("conversations") or row.get("messages")
    return turns if isinstance(turns, list) else []


def _is_prompt_and_completion(row: dict[str, Any]) -> bool:
    named = [bool(row.get(key)) for key in ("prompt", "completion", "messages", "conversations")]
    return named == [True, True, False, False]


def _spoken(content: Any, role: str) -> list[Any]:
    """TRL's prompts and completions: a list of messages, or a text that is one."""
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def misfit(row: Any) -> str:
    """Why the first row fits no format."""
    if isinstance(row, MalformedRow):
        return f"in the first row {row.problem}"
    if not isinstance(row, dict):
        return f"the first row is {found_in_words(row)}"
    first = next((turn for turn in given_turns(row) if isinstance(turn, dict) and turn), None)
    if first is None:
        return f"the first row has the keys {sorted(map(str, row))} and no turns"
    return (
        f"the turns of the first row have the keys {sorted(map(str, first))}, where 'from' and 'value' or 'role' and "
        "'content' are known"
    )


def row_id(row: Any, index: int, source: str = "") -> str:
    """What a row is called: its id, or its place in the file.

    Raises:
        BadSample: an id that is no text (half of a surrogate pair).
    """
    own_id = row.get("id") if isinstance(row, dict) else None
    if own_id is None or own_id == "":
        return f"#{index}"
    check_text(str(own_id), "its id", f"#{index}", source)
    return str(own_id)


def system_turn(
    row: dict[str, Any], pairs: list[tuple[str, str]], sample_id: str, source: str
) -> list[tuple[str, str]]:
    """The system turn: the one among the turns, or what a column beside them says."""
    system = pairs[:1] if pairs and pairs[0][0] == "system" else []
    for name, value in row.items():
        if str(name).lower() not in SYSTEM or is_empty(value):
            continue
        if not isinstance(value, str):
            raise malformed(sample_id, source, f"the column {name!r} is {found_in_words(value)}, not a text")
        if system and system[0][1] != value:
            raise malformed(sample_id, source, f"the column {name!r} and another system prompt differ: keep one")
        system = [("system", value)]
    return system


def turn_list(row: Any, sample_id: str, source: str) -> list[Any]:
    if isinstance(row, dict) and row.get("conversations") and row.get("messages"):
        raise malformed(sample_id, source, "it has both 'conversations' and 'messages': keep one")
    turns = given_turns(row)
    prompt = row["prompt"] if turns and _is_prompt_and_completion(row) else None
    if isinstance(prompt, list) and any(isinstance(one, dict) and one.get("role") == "assistant" for one in prompt):
        raise malformed(sample_id, source, "the prompt holds an answer, which would be learned as well: use messages")
    if not turns:
        key = (
            "messages"
            if isinstance(row, dict) and row.get("conversations") is None and "messages" in row
            else "conversations"
        )
        raise malformed(sample_id, source, f"there is no list {key!r} of turns in {found_in_words(row)}")
    return turns


def role_of(turn: dict[str, Any], key: str, number: int, sample_id: str, source: str) -> str:
    name = turn.get(key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None or (role == "system" and number):
        raise malformed(sample_id, source, f"turn {number} has the role {name!r}; known are {', '.join(ROLES)}")
    refused = refused_key(turn, role) if len(turn) > 2 else None  # beside its role and text
    if refused is not None:
        raise malformed(sample_id, source, f"in turn {number}, {refused}")
    return role
