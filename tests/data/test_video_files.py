"""Real video files, made here by PyAV: which frames are read of them, and what of them is refused."""

import builtins
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_videos import number_of, picture, write_frames, write_sound, write_video

from shortzip.data import images, video_files
from shortzip.data.errors import MissingExtra
from shortzip.data.images import BadImage
from shortzip.data.known_images import KnownImages
from shortzip.data.video_frames import frames_seen, read_frames, video_key, video_length
from shortzip.data.videos import Sampling, check_video


def seen(name: Any, root: Path, frames: int = 5, fps: float | None = None) -> list[int]:
    return [number_of(frame) for frame in read_frames(name, root, Sampling(frames, fps))]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")],
)
def test_frames_are_counted_as_they_are_shown(tmp_path: Path, name: str, codec: str) -> None:
    """With frames that are predicted from later ones, and in containers without an index or a number of frames."""
    write_video(tmp_path / name, 24, codec=codec)
    assert video_length(name, tmp_path).frames == 24
    assert video_length(name, tmp_path).seconds == pytest.approx(23 / 4, abs=0.01)
    expected = np.linspace(0, 23, 7, dtype=int).tolist()
    assert seen(name, tmp_path, 7) == expected
    assert seen(name, tmp_path, 40, fps=1) == [0, 4, 8, 12, 16, 20]
    first = next(read_frames(name, tmp_path, Sampling(1)))
    assert first.mode == "RGB"
    assert np.abs(np.asarray(first).astype(int) - np.asarray(picture(0))).max() < 30


def test_a_short_video_gives_some_frames_twice_and_by_fps_fewer(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", 3, rate=2)
    assert seen("short.mp4", tmp_path, 6) == [0, 0, 0, 1, 1, 2]
    assert seen("short.mp4", tmp_path, 6, fps=2) == [0, 1, 2]
    assert seen("short.mp4", tmp_path, 2, fps=2) == [0, 2], "of more, so many spread evenly"
    write_video(tmp_path / "one.mp4", 1)
    assert seen("one.mp4", tmp_path, 3) == [0, 0, 0]
    assert seen("one.mp4", tmp_path, 3, fps=10) == [0]


def test_of_a_variable_rate_fps_takes_what_is_on_screen(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 6, seconds=[0, 0.1, 0.2, 1.0, 1.1, 5.0])
    assert video_length("v.mp4", tmp_path).seconds == pytest.approx(5.0)
    assert seen("v.mp4", tmp_path, 9, fps=1) == [0, 3, 4, 4, 4, 5]
    assert seen("v.mp4", tmp_path, 6) == [0, 1, 2, 3, 4, 5], "by number, whenever they are shown"


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_are_upright(tmp_path: Path, rotation: int) -> None:
    write_video(tmp_path / "turned.mp4", 2, rotation=rotation)
    frame = next(read_frames("turned.mp4", tmp_path, Sampling(1)))
    upright = picture(0).rotate(rotation, expand=True)
    assert frame.size == upright.size
    assert np.abs(np.asarray(frame).astype(int) - np.asarray(upright)).max() < 30


def test_the_direction_of_a_rotation_is_that_of_the_container_s_matrix(tmp_path: Path) -> None:
    """A telephone that is held upright writes the matrix 0 1 / -1 0: what is right in the file is seen below."""
    file = write_video(tmp_path / "phone.mp4", 1, rotation=90)
    content = file.read_bytes()
    written = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, -0x10000, 0, 0x10000, 0, 0))
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, 0x10000, 0, -0x10000, 0, 0))
    assert content.count(written) == 1
    file.write_bytes(content.replace(written, turned))
    frame = np.asarray(next(read_frames("phone.mp4", tmp_path, Sampling(1))))
    assert frame.shape == (48, 32, 3)
    assert frame[:, -4:].min() > 200, "the white bar at the top is at the right"
    assert frame[:, :8].max() < 60


def test_frames_that_lie_there_as_images(tmp_path: Path) -> None:
    names = write_frames(tmp_path / "clip", 12)
    assert seen("clip", tmp_path, 4) == [0, 3, 7, 11], "frame10 comes after frame2"
    assert seen(tuple(f"clip/{name}" for name in names[::-1]), tmp_path, 3) == [11, 6, 0], "as listed"
    assert seen("clip", tmp_path, 99, fps=1) == list(range(12)), "images have no times"
    (tmp_path / "clip" / "notes.txt").write_text("x")
    assert video_length("clip", tmp_path) == (12, None)


def damaged(folder: Path) -> dict[str, str]:
    """Files that are no videos, or no longer, and what is said of each."""
    whole = write_video(folder / "whole.mp4", 40).read_bytes()
    middle = len(whole) // 3
    written = {
        "half.mp4": (whole[: len(whole) // 2], "cannot be decoded as a video: Invalid data"),
        "hole.mp4": (whole[:middle] + b"\xff" * 900 + whole[middle + 900 :], "cannot be decoded"),
        "page.mp4": (b"<html>not found</html>" * 9, "cannot be decoded as a video: Invalid data"),
        "list.mp4": (b"#EXTM3U\n#EXTINF:3,\nwhole.mp4\n#EXT-X-ENDLIST\n", "cannot be decoded"),
        "list.txt": (b"ffconcat version 1.0\nfile whole.mp4\n", "cannot be decoded"),
        "empty.mp4": (b"", "the file is empty"),
    }
    for name, (content, _) in written.items():
        (folder / name).write_bytes(content)
    write_sound(folder / "sound.mp4")
    write_video(folder / "nothing.mkv", 0)
    (folder / "no-frames").mkdir()
    return {
        **{name: words for name, (_, words) in written.items()},
        "sound.mp4": "holds no moving picture, but audio",
        "nothing.mkv": "cannot be decoded|holds no frame",
        "no-frames": "the folder holds no image",
    }


def test_what_is_no_video_or_no_longer_one_is_refused_by_name(tmp_path: Path) -> None:
    for name, words in damaged(tmp_path).items():
        with pytest.raises(BadImage, match=words) as caught:
            seen(name, tmp_path, 8)
        assert caught.value.problem == "unreadable_video"
        assert name in str(caught.value)
    for name, problem in (("gone.mp4", "missing_video"), ("../x.mp4", "outside_image_root")):
        with pytest.raises(BadImage) as caught:
            check_video(name, tmp_path)
        assert caught.value.problem == problem
    (tmp_path / "clip.webm").write_bytes(b"x")
    with pytest.raises(BadImage, match=r"but there is clip\.webm"):
        check_video("clip.mp4", tmp_path)
    with pytest.raises(BadImage, match=r"b\.png") as caught:
        check_video(("a.png", "b.png"), write_frames(tmp_path, 1, "a.png") and tmp_path)
    assert caught.value.problem == "missing_video"


def test_a_cut_off_file_gives_its_frames_up_to_the_cut_and_then_an_error(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", 40, key_every=10, size=(320, 240)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    length = video_length("cut.mkv", tmp_path).frames
    assert 10 < length < 40, "what is there counts, whatever the header says"
    assert seen("cut.mkv", tmp_path, 3)[:2] == [0, (length - 1) // 2]


def test_large_frames_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "large.mp4", 2)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(BadImage, match="48 x 32 pixels, more than 1000"):
        seen("large.mp4", tmp_path)


def test_one_frame_at_a_time_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 30)
    made = []
    upright = video_files._upright
    monkeypatch.setattr(video_files, "_upright", lambda frame: made.append(frame) or upright(frame))
    frames = read_frames("a.mp4", tmp_path, Sampling(10))
    assert not made
    next(frames)
    next(frames)
    assert len(made) == 2
    frames.close()
    assert threading.active_count() < 20


def test_without_pyav_files_name_the_extra_and_frames_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", 3)
    write_frames(tmp_path / "clip", 3)
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"PyAV: pip install 'shortzip\[video\]'"):
        seen("a.mp4", tmp_path)
    assert seen("clip", tmp_path, 3) == [0, 1, 2]


def test_every_input_of_a_video_s_key_changes_it(tmp_path: Path) -> None:
    known = KnownImages()
    write_video(tmp_path / "a.mp4", 12)
    key = video_key("a.mp4", tmp_path, Sampling(4), known)
    assert key == video_key("a.mp4", tmp_path, Sampling(4), KnownImages())
    others = [
        video_key("a.mp4", tmp_path, Sampling(5), known),
        video_key("a.mp4", tmp_path, Sampling(4, fps=1.0), known),
        video_key("a.mp4", tmp_path, Sampling(4, fps=2.0), known),
    ]
    write_video(tmp_path / "b" / "a.mp4", 12)
    assert video_key("a.mp4", tmp_path / "b", Sampling(4), known) == key, "wherever it lies"
    content = (tmp_path / "b" / "a.mp4").read_bytes()
    (tmp_path / "b" / "a.mp4").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    others.append(video_key("a.mp4", tmp_path / "b", Sampling(4), known))
    names = tuple(f"clip/{name}" for name in write_frames(tmp_path / "clip", 4))
    others += [
        video_key(names, tmp_path, Sampling(4), known),
        video_key(names[::-1], tmp_path, Sampling(4), known),
    ]
    assert video_key("clip", tmp_path, Sampling(4), known) == others[-2], "a folder is its frames"
    picture(9).save(tmp_path / "clip" / "frame2.png")
    others.append(video_key("clip", tmp_path, Sampling(4), known))
    assert len({key, *others}) == 1 + len(others)


def test_a_length_is_read_once_and_only_where_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frames_seen("nowhere.mp4", tmp_path, Sampling(7), KnownImages()) == 7
    write_video(tmp_path / "a.mp4", 12)
    known = KnownImages()
    assert frames_seen("a.mp4", tmp_path, Sampling(7, fps=1), known) == 3
    monkeypatch.setattr(video_files, "require_pyav", lambda: pytest.fail("the file is opened again"))
    assert frames_seen("a.mp4", tmp_path, Sampling(7, fps=2), known) == 6


@pytest.mark.parametrize(("frames", "fps"), [(0, None), (5000, None), (4, 0.0), (4, -1.0), (4, float("nan"))])
def test_samplings_that_mean_nothing_are_refused(frames: int, fps: float | None) -> None:
    with pytest.raises(ValueError, match="are needed"):
        Sampling(frames, fps)
