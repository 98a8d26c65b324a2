# SPDX-License-Identifier: Apache-2.0
"""What is shown is whole: characters, and nothing that a stop text begins with."""

import pytest

from quantize.run.streaming import TextStream


class Bytes:
    """Every id is a byte."""

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve — 漢字 🙂!", "a\nb\n\nç", "x" * 200 + "é" * 90])
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    stream = TextStream(Bytes())
    pieces = [stream.feed([byte]) for byte in text.encode()]
    assert not any("�" in piece for piece in pieces)
    assert "".join([*pieces, stream.close()]) == text


def test_bytes_that_never_become_a_character_are_shown_in_the_end() -> None:
    stream = TextStream(Bytes())
    assert "".join(stream.feed([b]) for b in b"a\xe6\xbc") == "a"
    assert stream.close() == "�"
    stream = TextStream(Bytes())
    assert "".join(stream.feed([b]) for b in b"\xff\xff\xff\xff\xff\xffabc").endswith("abc")


def test_the_end_of_sequence_is_no_text() -> None:
    stream = TextStream(Bytes(), end=[0])
    assert stream.feed([*b"ab", 0]) + stream.close() == "ab"


@pytest.mark.parametrize("step", [1, 2, 3, 50])
def test_a_stop_text_cuts_and_what_only_looks_like_one_does_not(step: int) -> None:
    text, stop = "one <|two <|user|> three", ("<|user|>", "zzz")
    stream, shown = TextStream(Bytes(), stop=stop), ""
    raw = text.encode()
    for at in range(0, len(raw), step):
        piece = stream.feed(list(raw[at : at + step]))
        shown += piece
        assert "<|u" not in shown
    assert shown + stream.close() == "one <|two "
    assert stream.stopped
    open_end = TextStream(Bytes(), stop=stop)
    assert open_end.feed(list(b"so <|us")) == "so "
    assert open_end.close() == "<|us"
