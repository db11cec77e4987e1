"""Answers for others: an endpoint in front of an engine, and files of questions."""
