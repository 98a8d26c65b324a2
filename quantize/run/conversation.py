# SPDX-License-Identifier: Apache-2.0
"""Between messages and ids: what is asked, with each answer in the tokens that it was made of.

A text has many spellings in tokens. If an answer were tokenized anew for the next turn, the cache
of what the model has read and written would end where the spelling first differs.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling_dsv4.chat import FORMATS, AnswerStream, choose_variant, encode_messages

from .engine import Answer, Engine
from .settings import Settings

OnPiece = Callable[[str, str], None]
_REMEMBERED = 256


@dataclass
class Reply:
    """An answer's parts, and how it was made."""

    content: str = ""
    reasoning: str = ""
    calls: list[str] = field(default_factory=list)
    answer: Answer = field(default_factory=Answer)

    def message(self) -> dict[str, Any]:
        """As the next turn's history wants it."""
        said: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            said["reasoning_content"] = self.reasoning
        return said


class Conversations:
    """Asks an engine in the chat format that its tokenizer knows.

    Raises:
        ValueError: the tokenizer has the markers of no known format.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.variant = choose_variant(engine.tokenizer)
        self.form = FORMATS[self.variant]
        # Answers by where they stand: a text that another conversation holds is spelled anew.
        self._spelled: OrderedDict[tuple[bytes, str], list[int]] = OrderedDict()
        # Where the answer to a prompt's ids stands.
        self._places: OrderedDict[bytes, bytes] = OrderedDict()

    @property
    def thinks(self) -> bool:
        """Whether this format has reasoning."""
        return bool(self.form.think)

    def encode(
        self, messages: Sequence[Mapping[str, Any]], thinking: bool, **options: Any
    ) -> list[int]:
        """Ids of a conversation up to where the answer begins.

        Args:
            messages: `{"role", "content"}`, ...
            thinking: the answer reasons first.
            options: others of `encode_messages`.
        """
        chat = encode_messages(messages, self.variant, thinking=thinking, **options)
        ids, at = [], 0
        for start, stop in chat.spans:
            ids += self.engine.encode(chat.text[at:start]) if at < start else []
            said = chat.text[start:stop]
            place = self._place(chat.text[:start])
            ids += self._spelled.get((place, said)) or self.engine.encode(said)
            at = stop
        ids += self.engine.encode(chat.text[at:]) if at < len(chat.text) else []
        self._places[_digest(repr(ids))] = self._place(chat.text)
        if len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)
        return ids

    def _place(self, before: str) -> bytes:
        """What tells the place of an answer: the conversation up to its turn."""
        cut = before.rfind(self.form.assistant) if self.form.assistant else -1
        return _digest(before[:cut] if cut >= 0 else before)

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: Settings,
        on_piece: OnPiece | None = None,
        thinking: bool = False,
        **options: Any,
    ) -> Reply:
        """Answer the last message.

        Args:
            messages, thinking, options: as `encode`.
            settings: as `Engine.answer`.
            on_piece: hears ("reasoning" | "content" | "tool_call", text) as it comes.
        """
        ids = self.encode(messages, thinking, **options)
        return self.ask_ids(ids, settings, on_piece, thinking)

    def ask_ids(
        self,
        ids: list[int],
        settings: Settings,
        on_piece: OnPiece | None = None,
        thinking: bool = False,
        border: int = 0,
    ) -> Reply:
        """The same for a conversation that `encode` has written.

        Args:
            ids: [n] up to where the answer begins.
            settings, on_piece, thinking: as `ask`.
            border: as `Engine.answer`.
        """
        reply, stream = Reply(), _Pieces(AnswerStream(self.variant, thinking))

        def tell(text: str) -> None:
            for kind, piece in stream.feed(text):
                self._take(reply, kind, piece, on_piece)

        # A model that goes on by itself with the next question has ended its answer.
        form = self.form
        turns = tuple(m for m in (form.user, form.assistant, form.system, form.reminder) if m)
        asked = Settings(**{**vars(settings), "stop": (*settings.stop, *turns)})
        reply.answer = self.engine.answer(ids, asked, tell, border, thinking)
        for kind, piece in stream.close():
            self._take(reply, kind, piece, on_piece)
        self._remember(reply, ids)
        return reply

    def _take(self, reply: Reply, kind: str, text: str, tell: OnPiece | None) -> None:
        if kind == "reasoning":
            reply.reasoning += text
        elif kind == "tool_call":
            reply.calls.append(text)
        else:
            reply.content += text
        if tell is not None:
            tell(kind, text)

    def _remember(self, reply: Reply, prompt: list[int]) -> None:
        """Note in which ids the model spelled this answer."""
        ids, eos = reply.answer.ids, self.engine.encode(self.form.eos)
        body = ids[: -len(eos)] if ids[-len(eos) :] == eos else ids
        if reply.reasoning:
            # The next turn leaves it out.
            marker = self.engine.encode(self.form.end_think)[0]
            body = body[body.index(marker) + 1 :] if marker in body else []
        if self.engine.tokenizer.decode(body, skip_special_tokens=False) != reply.content:
            return
        place = self._places.get(_digest(repr(prompt)))
        if place is None:
            return
        self._spelled[place, reply.content + self.form.eos] = [*body, *eos]
        if len(self._spelled) > _REMEMBERED:
            self._spelled.popitem(last=False)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class _Pieces:
    """An `AnswerStream` that takes a malformed call as text: a model's slip is no error of ours."""

    def __init__(self, stream: AnswerStream) -> None:
        self.stream = stream
        self._raw = False
        # What was fed and has not come back as a piece.
        self._since = ""

    def feed(self, text: str) -> list[tuple[str, str]]:
        if self._raw:
            return [("content", text)]
        self._since += text
        return self._try(lambda: self.stream.feed(text))

    def close(self) -> list[tuple[str, str]]:
        return [] if self._raw else self._try(self.stream.close)

    def _try(self, step: Callable[[], list[tuple[str, str]]]) -> list[tuple[str, str]]:
        try:
            pieces = step()
        except ValueError:
            self._raw = True
            return [("content", self._since)]
        at = 0
        for kind, text in pieces:
            at = len(self._since) if kind == "tool_call" else self._since.find(text, at) + len(text)
        self._since = self._since[at:]
        return pieces
