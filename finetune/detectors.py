# SPDX-License-Identifier: Apache-2.0
"""Probable secrets and personal data in texts, and texts without them.

| kind | found by | not flagged |
|---|---|---|
| secret | `detect-secrets`' formats of keys and tokens, a few more, `password: ..` | templates |
| email | its shape | reserved domains: example.com, .test, .invalid, .localhost |
| phone | `phonenumbers`: + numbers; national ones if a region is given | numbers no country has |
| card | 13 to 19 digits, an issuer's prefix, Luhn | other numbers |
| iban | country's length and checksum (`python-stdnum`) | the rest |
| id | numbers of persons with checksum, see `identity_numbers` | plain digits without cue |
| ip | public addresses | private, reserved and documentation ranges, versions |

Probable: a checksum is right by chance once in ten for plain digits, and names, addresses and
secrets of no known shape are not found. Nothing is sent anywhere: of `detect-secrets` only the
patterns are used, not its verification, which would try keys out.
"""

import importlib
import ipaddress
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from .identity_numbers import find_identities, is_card, valid_iban

KINDS = ("secret", "email", "iban", "card", "id", "ip", "phone")


@dataclass(frozen=True, order=True)
class Span:
    """[start, stop) of a text, one of `KINDS`, and what it is more exactly."""

    start: int
    stop: int
    kind: str
    detail: str = ""


_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_RESERVED = re.compile(r"(?i)(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{1,4}){3,8}\b")
_CARD = re.compile(r"(?<![\w.,+-])[3-6](?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]{4,35}[0-9A-Fa-f](?![\w:])")
_VERSION = re.compile(r"(?i)(?:\bv|version|release|build|section|§)[ :=]*$")
# Resolvers that documents name as such.
_KNOWN_HOSTS = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"}
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:.*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|.*)",
    re.DOTALL,
)
# An assignment is looked for at its sign, which is rarer than the words before it.
_ASSIGNED = re.compile(r"(?::=|=>|:|=)\s{0,3}[\"'`]?([^\s\"'`,;<>{}()$]{8,200})")
_NAME = re.compile(
    r"(?i)(?:pass(?:word|wd|phrase)?|passwort|kennwort|pwd|secret|api[_-]?key|"
    r"(?:access|auth|secret|private)[_-]?(?:key|token)|token)[\"'`]?\s{0,3}$"
)
# Formats that detect-secrets 1.5 does not have, or has in an older shape.
_MORE = (
    ("OpenAI or Anthropic key", re.compile(r"\bsk-(?:proj|svcacct|ant|admin)-[\w-]{20,}")),
    ("GitHub token", re.compile(r"\bgithub_pat_\w{40,}")),
    ("Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}")),
    ("Google key", re.compile(r"\bAIza[\w-]{35}\b")),
)
# Plugins that look for something else, or that only guess.
_LEFT_OUT = ("base", "high_entropy_strings", "ip_public", "keyword", "private_key", "artifactory")
# Keys and tokens are long, all of them: patterns are tried around such runs alone.
_LONG = re.compile(r"[\w+/=-]{16,}")
_AROUND = 160
_TOKEN_END = re.compile(r"[^\w+/=.-]|$")
# What patterns of an assigned key begin with, in some spelling.
_CUE = re.compile(r"(?i)pass|pwd|pw|secret|token|key")
_PHONE = re.compile(r"\+[ (]{0,2}\d(?:[ ()./\-\u00a0\u2010-\u2015]{0,3}\d){6,16}")
_NATIONAL = re.compile(_PHONE.pattern.replace(r"\+[ (]{0,2}", r"\+?[ (]{0,2}", 1))


class Detector:
    """Finds and replaces; `region` (as in DE) reads national phone numbers too.

    Raises:
        ValueError: one of the three libraries is missing, or the region is unknown.
    """

    def __init__(self, region: str | None = None) -> None:
        phones = _import("phonenumbers")
        if region is not None and region not in phones.SUPPORTED_REGIONS:
            raise ValueError(f"region: wanted two capital letters, as in DE, got {region!r}")
        self.region = region
        self._phones = phones
        self._patterns = _secret_patterns()

    def find(self, text: str) -> list[Span]:
        """All spans in order; those that overlap are one, named by the first of `KINDS`."""
        steps: tuple[Callable[[str], Iterator[Span]], ...] = (
            self._secrets,
            _emails,
            _numbers,
            find_ips,
            self._numbers_to_call,
        )
        spans = sorted({span for step in steps for span in step(text)})
        merged: list[Span] = []
        for span in spans:
            last = merged[-1] if merged else None
            if last is None or span.start >= last.stop:
                merged.append(span)
                continue
            best = min(last, span, key=lambda one: KINDS.index(one.kind))
            stop = max(last.stop, span.stop)
            merged[-1] = Span(last.start, stop, best.kind, best.detail)
        return merged

    def redact(self, text: str) -> str:
        """The text with `[EMAIL]`, `[PHONE]` and so on in the places of what was found."""
        return replace_spans(text, self.find(text))

    def _secrets(self, text: str) -> Iterator[Span]:
        if "PRIVATE KEY" in text:
            for match in _PRIVATE_KEY.finditer(text):
                yield Span(*match.span(), "secret", "private key")
        for start, finish in _windows(text):
            part = text[start:finish]
            has_cue = _CUE.search(part) is not None
            for name, pattern, valid, assigns in self._patterns:
                if assigns and not has_cue:
                    continue
                for match in pattern.finditer(part):
                    if valid is None or valid(match.group()):
                        # Some patterns stop early, as where a token's signature begins.
                        stop = _TOKEN_END.search(part, match.end() - 1)
                        end = match.end() if stop is None else max(stop.start(), match.end())
                        yield Span(start + match.start(), start + end, "secret", name)
        for match in _ASSIGNED.finditer(text):
            if _looks_random(match.group(1)):
                start = match.start()
                if _NAME.search(text[max(0, start - 24) : start]):
                    yield Span(*match.span(1), "secret", "password or key")

    def _numbers_to_call(self, text: str) -> Iterator[Span]:
        shape = _PHONE if self.region is None else _NATIONAL
        for likely in shape.finditer(text):
            # With what stands around it, as an extension behind a number, or a letter before.
            start = max(0, likely.start() - 3)
            part = text[start : likely.end() + 14]
            for match in self._phones.PhoneNumberMatcher(part, self.region):
                yield Span(start + match.start, start + match.end, "phone")


def replace_spans(text: str, spans: list[Span]) -> str:
    """Put placeholders in the places of spans."""
    parts, at = [], 0
    for span in spans:
        parts += [text[at : span.start], f"[{span.kind.upper()}]"]
        at = span.stop
    return "".join([*parts, text[at:]])


def excerpt(text: str, spans: list[Span], span: Span, around: int = 24) -> str:
    """A span's surroundings in one line; it and every other finding are placeholders."""
    before = replace_spans(text[: span.start], [one for one in spans if one.stop <= span.start])
    after = [
        Span(one.start - span.stop, one.stop - span.stop, one.kind)
        for one in spans
        if one.start >= span.stop
    ]
    behind = replace_spans(text[span.stop :], after)
    shown = f"{before[-around:]}[{span.kind.upper()}]{behind[:around]}"
    return " ".join(shown.split())


def find_ips(text: str) -> Iterator[Span]:
    """Public addresses."""
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match.group())
            except ValueError:
                continue
            version = _VERSION.search(text[max(0, match.start() - 12) : match.start()])
            if address.is_global and not version and match.group() not in _KNOWN_HOSTS:
                yield Span(*match.span(), "ip")


def _emails(text: str) -> Iterator[Span]:
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        if not _RESERVED.search(match.group().rpartition("@")[2]):
            yield Span(*match.span(), "email")


def _numbers(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        size = valid_iban(match.group())
        if size:
            yield Span(match.start(), match.start() + size, "iban")
    for match in _CARD.finditer(text):
        if is_card(match.group()):
            yield Span(*match.span(), "card")
    for start, stop, name in find_identities(text):
        yield Span(start, stop, "id", name)


def _looks_random(value: str) -> bool:
    """Letters and digits, and neither a template nor a row of the same."""
    return (
        any(c.isdigit() for c in value)
        and any(c.isalpha() for c in value)
        and len(set(value)) > 4
        and not re.match(r"(?i)https?:|\[|%|/|\d+[a-z]?$", value)
    )


def _windows(text: str) -> Iterator[tuple[int, int]]:
    """[start, stop) of the surroundings of long runs, and of addresses with a password."""
    found = [match.span() for match in _LONG.finditer(text)]
    if "@" in text and "://" in text:
        found = sorted([*found, *(match.span() for match in re.finditer("://", text))])
    low = high = 0
    for start, stop in found:
        line = text.rfind("\n", 0, start) + 1
        end = text.find("\n", stop)
        begin, finish = max(line, start - _AROUND), stop + _AROUND
        finish = finish if end < 0 else min(finish, end)
        if begin > high:
            yield low, high
            low = begin
        high = max(high, finish)
    if found:
        yield low, high


@cache
def _secret_patterns() -> tuple[tuple[str, re.Pattern[str], Any, bool], ...]:
    """(name, pattern, check of the match or None, whether a key is assigned)."""
    plugins = _import("detect_secrets.plugins")
    base = importlib.import_module("detect_secrets.plugins.base").RegexBasedDetector
    found: list[tuple[str, re.Pattern[str], Any, bool]] = []
    for module in pkgutil.iter_modules(plugins.__path__):
        if module.name in _LEFT_OUT:
            continue
        names = vars(importlib.import_module(f"detect_secrets.plugins.{module.name}"))
        for plugin in _subclasses(names.values(), base):
            valid = getattr(plugin, "is_formally_valid", None)
            for pattern in plugin.denylist:
                assigns = "(?:=|:|:=|=>" in pattern.pattern
                found.append((plugin.secret_type, pattern, valid, assigns))
    return (*found, *((name, pattern, None, False) for name, pattern in _MORE))


def _subclasses(values: Iterable[Any], base: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, type) and issubclass(value, base) and value is not base:
            yield value


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"looking for secrets and personal data needs {name.partition('.')[0]}; install "
            "dsv4[finetune], or leave the scan out"
        ) from error
