# SPDX-License-Identifier: Apache-2.0
"""Numbers of persons, cards and accounts: shapes as data, checksums by `python-stdnum`."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

# How far before a number its cue may stand, in characters.
_NEAR = 48
# First digits and lengths of Visa, Mastercard, Amex, Discover, Diners, JCB, UnionPay, Maestro.
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}$|(?:5[1-5]|2[2-7])\d{14}$|3[47]\d{13}$|6(?:011|5\d\d|4[4-9]\d)\d{12}$"
    r"|3(?:0[0-5]|[68]\d)\d{11}$|35\d{14}$|62\d{14,17}$|(?:50|5[6-9]|6\d)\d{10,17}$"
)


@dataclass(frozen=True)
class Identity:
    """One country's number: its module in `stdnum`, its shape, and a word that must be near.

    A cue is wanted where plain digits are the shape, which other numbers have too.
    """

    name: str
    module: str
    shape: str
    cue: str = ""


IDENTITIES = (
    Identity("US social security", "us.ssn", r"\d{3}-\d{2}-\d{4}"),
    Identity("US social security", "us.ssn", r"\d{9}", r"ssn|social security"),
    Identity("DE tax", "de.idnr", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", r"steuer|idnr|tin\b|tax"),
    Identity("FR social security", "fr.nir", r"[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d"),
    Identity("ES identity", "es.dni", r"\d{8}-?[A-Z]"),
    Identity("ES foreigner", "es.nie", r"[XYZ]-?\d{7}-?[A-Z]"),
    Identity("IT fiscal code", "it.codicefiscale", r"[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]"),
    Identity("GB health service", "gb.nhs", r"\d{3}[ -]?\d{3}[ -]?\d{4}", r"\bnhs\b"),
    Identity("NL citizen service", "nl.bsn", r"\d{9}", r"\bbsn\b|burgerservice|sofi"),
    Identity("BE national", "be.nn", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d"),
    Identity("CH social security", "ch.ssn", r"756[. ]?\d{4}[. ]?\d{4}[. ]?\d\d"),
    Identity("AT social security", "at.vnr", r"\d{4} ?\d{6}", r"versicherung|svnr|sv-n"),
    Identity("PL national", "pl.pesel", r"\d{11}", r"pesel"),
    Identity("SE personal", "se.personnummer", r"(?:\d\d)?\d{6}[-+]\d{4}"),
    Identity("DK personal", "dk.cpr", r"\d{6}-?\d{4}", r"\bcpr\b"),
    Identity("FI personal", "fi.hetu", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]"),
    Identity("RO personal", "ro.cnp", r"\d{13}", r"\bcnp\b"),
    Identity("TR identity", "tr.tckimlik", r"\d{11}", r"kimlik|\btc\b|t\.c\."),
    Identity("BR taxpayer", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d"),
    Identity("BR taxpayer", "br.cpf", r"\d{11}", r"\bcpf\b"),
    Identity("CA social insurance", "ca.sin", r"\d{3}[ -]?\d{3}[ -]?\d{3}", r"\bsin\b|insurance"),
    Identity("AU tax file", "au.tfn", r"\d{3} ?\d{3} ?\d{3}", r"\btfn\b|tax file"),
    Identity("CN resident", "cn.ric", r"\d{17}[\dX]"),
    Identity("IN Aadhaar", "in_.aadhaar", r"\d{4}[ -]?\d{4}[ -]?\d{4}", r"aadha+r|uidai"),
    Identity("KR resident", "kr.rrn", r"\d{6}-\d{7}"),
    Identity("ZA identity", "za.idnr", r"\d{13}", r"\bid\b|identity"),
)
# Where one can begin: seven digits or more, in groups or with single letters between.
_START = re.compile(r"(?<![\w.,-])(?=[A-Z]{0,6}-?\d(?:[ .\-+A-Z]{0,2}\d){6})[A-Z\d]")


def find_identities(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, stop, name) of every number with the shape, the checksum and the cue."""
    for place in _START.finditer(text):
        start = place.start()
        near = text[max(0, start - _NEAR) : start]
        for identity, shape, cue in _compiled():
            match = shape.match(text, start)
            if match is None or (cue and not cue.search(near)):
                continue
            if _module(identity.module).is_valid(match.group()):
                yield start, match.end(), identity.name


def is_card(text: str) -> bool:
    """Whether digits, blanks and hyphens are a card's number: issuer, length and Luhn."""
    digits = re.sub(r"[ -]", "", text)
    return (
        bool(_ISSUERS.match(digits)) and len(set(digits)) > 1 and _module("luhn").is_valid(digits)
    )


def valid_iban(text: str) -> int:
    """How many leading characters are an IBAN with the right checksum; 0 if none are."""
    stops = [match.start() for match in re.finditer(r" |$", text)]
    for stop in reversed(stops):
        if _module("iban").is_valid(text[:stop]):
            return stop
    return 0


@cache
def _compiled() -> tuple[tuple[Identity, re.Pattern[str], re.Pattern[str] | None], ...]:
    return tuple(
        (
            one,
            re.compile(rf"{one.shape}(?![\w-]|[.,]\d)"),
            re.compile(one.cue, re.IGNORECASE) if one.cue else None,
        )
        for one in IDENTITIES
    )


@cache
def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"stdnum.{name}")
    except ImportError as error:
        raise ValueError(
            "looking for personal data needs python-stdnum; install dsv4[finetune], or leave the "
            "scan out"
        ) from error
