"""The token benchmark has a figure for every step of every kind of chat."""

from click.testing import CliRunner

from loadtests import bench_tokens
from loadtests.bench_tokens import HEAD


def test_every_kind_of_chat_has_its_figures(monkeypatch) -> None:
    monkeypatch.setattr(bench_tokens, "SIZES", (1, 4))
    monkeypatch.setattr(bench_tokens, "CHATS", 2)
    done = CliRunner().invoke(bench_tokens.main, catch_exceptions=False)
    encoder, head, _, *rows = done.output.splitlines()
    assert encoder.startswith("fastokens")
    assert head.strip("| ").split(" | ") == HEAD
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        *_, messages, tokens, decode, render, encode, read, keys, as_json = row.strip("| ").split(" | ")
        assert int(messages) >= 1
        assert int(tokens) > 100
        assert all(float(figure) > 0 for figure in (decode, render, encode, read, keys, as_json))
