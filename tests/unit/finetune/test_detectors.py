# SPDX-License-Identifier: Apache-2.0
"""What is found and what is left alone, kind by kind; redaction that leaves nothing."""

import socket
from typing import Any

import pytest

from finetune.detectors import KINDS, Detector, excerpt
from finetune.identity_numbers import IDENTITIES, find_identities, is_card, valid_iban

# Put together here, so that no tool that looks for secrets stumbles over this file.
AWS = "AKIA" + "2E0A8F3B244C9986"
GITHUB = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
SLACK = "xoxb-" + "123456789012-123456789012-" + "abcdEFGHijklMNOPqrstUVWX"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----"
STRIPE = "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc"

HITS = [
    ("secret", AWS),
    ("secret", GITHUB),
    ("secret", SLACK),
    ("secret", JWT),
    ("secret", KEY),
    ("secret", STRIPE),
    ("secret", "sk-proj-" + "abcdEFGH1234ijklMNOP5678"),
    ("secret", "hf_" + "abcdefghijKLMNOPQRSTuvwxyz0123456789"),
    ("email", "jo.doe+x@mail.corp-site.de"),
    ("email", "J_D@sub.uni.ac.uk"),
    ("phone", "+49 30 901820"),
    ("phone", "+1 (650) 253-0000"),
    ("card", "4111 1111 1111 1111"),
    ("card", "5555-5555-5555-4444"),
    ("card", "378282246310005"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB82WEST12345698765432"),
    ("ip", "93.184.216.34"),
    ("ip", "2606:2800:220:1:248:1893:25c8:1946"),
    ("id", "536-22-1234"),
    ("id", "X-5253868-R"),
    ("id", "RCCMNL83S18D969H"),
    ("id", "2 95 10 99 126 111 93"),
    ("id", "756.9217.0769.85"),
    ("id", "390.533.447-05"),
    ("id", "11010519491231002X"),
]
MISSES = [
    "jo@example.com and admin@host.test",
    "git@github and @decorator and a@b",
    "call 030 901820 or 12 of 50 items",
    "+99 999 999 is no country",
    "4111 1111 1111 1112 fails Luhn, 1234567890123456 is no issuer's",
    "0.4111111111111111 is a fraction",
    "DE89 3704 0044 0532 0130 01 has a wrong checksum",
    "10.0.0.1, 192.168.1.20, 127.0.0.1, 192.0.2.7 and 8.8.8.8",
    "v1.20.3.4, version 93.184.216.34, 1.2.3.4.5, 300.1.2.3",
    "at 12:30:45, ratio 1:2:3, fe80::1, ::1",
    "000-12-3456 and 666-12-3456 are no numbers",
    "isbn 978-3-16-148410-0, order 123456789, 2026-11-27",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0bfb22bd15d6c15b0f00a08",
    "password: required, the token is [TOKEN], secret = os.environ['A1B2C3D4']",
    "password: ${DB_PASSWORD_1}, api_key={{ key_2 }}, token: 12345678",
    "a long_identifier_with_many_parts_12 and /usr/local/lib/python3.11/site-packages",
    "pi = 3.14159265358979, 299792458 m/s, 6.02214076e23",
]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


@pytest.mark.parametrize(("kind", "text"), HITS)
def test_found_whole_and_alone(detector: Detector, kind: str, text: str) -> None:
    around = f"one, two: {text}\nnext 7"
    spans = detector.find(around)
    assert [(span.kind, around[span.start : span.stop]) for span in spans] == [(kind, text)]
    assert detector.redact(around) == f"one, two: [{kind.upper()}]\nnext 7"


@pytest.mark.parametrize("text", MISSES)
def test_left_alone(detector: Detector, text: str) -> None:
    assert detector.find(text) == []


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("password: Sommer2024!", "Sommer2024!"),
        ('api_key="a8f5f167f44f4964"', "a8f5f167f44f4964"),
        ("DB_PASSWORD=hunter2hunter", "hunter2hunter"),
        ("Passwort = geheim-77-x", "geheim-77-x"),
        ("https://user:s3cretpw@host.corp/x", "s3cretpw"),
        ("aws_secret_key = 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzKEY'", "wJalrXUtnFEMI"),
    ],
)
def test_assigned_passwords_are_found(detector: Detector, text: str, secret: str) -> None:
    assert [span.kind for span in detector.find(text)] == ["secret"]
    assert secret not in detector.redact(text)


def test_a_key_that_never_ends_is_taken_to_the_end(detector: Detector) -> None:
    assert detector.redact(f"see {KEY[:50]}\nmore") == "see [SECRET]"


def test_national_phone_numbers_want_a_region() -> None:
    text = "ring 030 901820 today"
    assert Detector().find(text) == []
    assert Detector("DE").redact(text) == "ring [PHONE] today"
    with pytest.raises(ValueError, match="region: wanted two capital letters, as in DE, got 'de'"):
        Detector("de")


def test_plain_digits_want_a_cue_and_a_checksum(detector: Detector) -> None:
    assert detector.redact("BSN 111222333") == "BSN [ID]"
    assert detector.find("BSN 111222334") == []
    assert detector.find("order 111222333") == []
    assert list(find_identities("Steuer-ID: 36 574 261 809")) == [(11, 25, "DE tax")]


def test_overlapping_finds_are_one_of_the_graver_kind(detector: Detector) -> None:
    text = "password: jo1@mail.corp-site.de"
    assert [span.kind for span in detector.find(text)] == ["secret"]
    assert detector.redact(text) == "password: [SECRET]"


def test_long_lines_are_searched_to_their_end(detector: Detector) -> None:
    filler = "plain words and " * 40
    text = "".join(filler + token + " " for token in (AWS, GITHUB, SLACK, JWT)) + filler
    assert [span.kind for span in detector.find(text)] == ["secret"] * 4


def test_a_token_is_found_whole_however_far_from_another_long_run(detector: Detector) -> None:
    for distance in range(0, 400, 5):
        text = "x" * 20 + " " + "w " * (distance // 2) + JWT + " end"
        assert detector.redact(text).endswith(
            "w [SECRET] end" if distance > 1 else "x [SECRET] end"
        )


def test_excerpts_never_show_what_was_found(detector: Detector) -> None:
    text = "; ".join(value for _, value in HITS)
    spans = detector.find(text)
    assert {span.kind for span in spans} == set(KINDS)
    for span in spans:
        shown = excerpt(text, spans, span)
        assert f"[{span.kind.upper()}]" in shown
        parts = [part for _, value in HITS for part in value.split() if len(part) > 5]
        assert not any(part in shown for part in parts)


def test_redacted_text_holds_nothing_any_more(detector: Detector) -> None:
    text = "\n".join(f"item: {value}" for _, value in HITS)
    assert detector.find(detector.redact(text)) == []


def test_nothing_is_sent_anywhere(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert detector.find(f"{AWS} {SLACK} {STRIPE}")


def test_numbers_by_themselves() -> None:
    assert is_card("6011 1111 1111 1117")
    assert not is_card("0000 0000 0000 0000")
    assert valid_iban("DE89 3704 0044 0532 0130 00 AND") == 27
    assert valid_iban("XX89 3704 0044 0532 0130 00") == 0
    assert len({(one.module, one.cue) for one in IDENTITIES}) == len(IDENTITIES)
