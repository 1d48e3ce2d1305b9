#!/usr/bin/env python3
"""Holds the engine's tokenizer, split rules and chat templates against independent implementations.

References: PyPI `tokenizers` over the vocabulary and merges of a GGUF file (byte-level BPE and split rules),
PyPI `sentencepiece` on small models trained here, and Jinja2 with the settings that transformers renders chat
templates with.

    check_tokenizer.py --model SmolLM2-135M-Instruct.Q4_1.gguf --corpus genesis.txt --write tests/data
        records the fixtures tokenizer_smollm2.json, tokenizer_splits.json, tokenizer_sentencepiece.json and
        chat_templates.json, which the tests check the engine with

    check_tokenizer.py --model ... --corpus genesis.txt --engine-tests build/tests/engine_tests
        compares live, on more texts: every assigned Unicode character among them

The corpus is any plain text of some 100 KB; `bible -f Gen1:1-50:26` (Debian's bible-kjv) made the recorded
one.
Needs: gguf, tokenizers, sentencepiece, protobuf, jinja2.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import sentencepiece
from gguf import GGUFReader
from chat_templates import chat_cases, write
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3  # GGUF's number for it

# ---- texts -------------------------------------------------------------------------------------------------

PLAIN = [
    "", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", " \n", "\n ", " \t \n ", "a", " a", "a ", " a ",
    "  a  ", "Hello, world!", "hello world", "HELLO WORLD", "Hello  world", "Hello   world", "Hello\nworld",
    "Hello\n\nworld", "The quick brown fox jumps over the lazy dog.",
    "In the beginning God created the heaven and the earth.",
    "And the earth was without form, and void; and darkness was upon the face of the deep.",
    "don't can't won't I'm you're they've he'll she'd it's", "DON'T CAN'T I'M YOU'RE THEY'VE HE'LL",
    "'s 't 're 've 'm 'll 'd", "rock 'n' roll", "''''", "a'b'c", "o'clock's", "0", "1", "12", "123", "1234",
    "12345", "123456789", "3.14159", "1,234,567.89", "-42", "+7", "1e-5", "0x1F", "2024-01-31T12:34:56Z",
    "v1.2.3", "a1b2c3", "1st 2nd 3rd", "  12  34  ", "12 34\n56", "192.168.0.1:8080", "(555) 123-4567",
    "$99.99", "50%", "#1", "№5", "½ ¼ ¾", "²³¹", "①②③", "Ⅳ ⅷ", "٣٤٥", "१२३", "၁၂၃", "𝟘𝟙𝟚", "a\tb", "a\t\tb",
    "\ta", "a\t", "a \t b", "a\r\nb", "a\r\n\r\nb\r\n", "a\rb", "line one\r\nline two\r\n",
    "a\n b\n  c\n   d\n", "trailing   ", "   leading", "tabs\t\t\tand   spaces \t mixed", "a\u00a0b",
    "a\u2003b", "a\u3000b", "a\u200bb", "a\u2028b\u2029c", "a\x0bb\x0cc", "\u00a0\u00a0", "a \u00a0 b",
    "\u1680x", "\u180ex", "\u0085x", "x\u0085 y", "\ufeffBOM", "a\u200db", "a\u202eb", "!", "!!", "!!!",
    "...", "?!", " !", " ...", "a!b?c.", "<>", "<<>>", "{}[]()", "()()()", "---", "===", "____", "a_b_c",
    "__init__", "***bold***", "C++ & C# / F#", "a/b/c", "a\\b\\c", "https://example.com/path?q=1&r=2#frag",
    "user@example.com", "~/.bashrc", "C:\\Windows\\System32",
    "int main(int argc, char** argv) {\n  return 0;\n}\n", "def f(x):\n    return x**2\n\n\nprint(f(3))\n",
    "for (std::size_t i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    "#include <vector>\n\n// comment\ntemplate <typename T>\n",
    "<html><body class=\"x\">&nbsp;</body></html>", "{\"key\": [1, 2.5, null, true], \"s\": \"\\u00e9\"}",
    "SELECT * FROM t WHERE a >= 10;", "x = 3 if y else None  # trailing\n",
    "\\frac{1}{2} \\sum_{i=0}^{n} x_i^2", "$E = mc^2$", "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "- [ ] todo\n- [x] done\n", "café", "cafe\u0301", "naïve coöperate", "Ångström", "A\u030angstro\u0308m",
    "e\u0301\u0302\u0303", "\u0301", " \u0301", "a\u0301 b\u0302", "ﬁ ﬂ ﬀ", "Straße", "ÇA VA", "Ünïcödé",
    "ſ 'ſ", "İstanbul ıı", "ǅ ǆ Ǆ", "Привет, мир!", "Γειά σου Κόσμε", "Ωμέγα ώ", "שלום עולם",
    "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界！", "こんにちは世界", "カタカナ ひらがな", "안녕하세요 세계", "안녕",
    "中文English混合123", "。、！？", "Ａｂｃ１２３", "𠮷野家", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ꙮ", "ᚠᚢᚦ", "😀", "😀😀", " 😀", "a😀b", "👍🏽",
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "1️⃣2️⃣", "☃︎ ☃️", "❤️", "→ ← ↔ ⇒", "∀x∈ℝ: x²≥0", "©®™", "€£¥₹",
    "“quoted” ‘single’ — dash – en …", "\ufffd", "\ufffd\ufffd", "Ã©", "Ã(", "\u00c3\u0028", "â€™", "ï¿½",
    "\uffff", "\ufffe", "\U0010ffff", "\ue000", "\U000f0000", "\x00", "a\x00b", "\x01\x02\x03", "\x04\x06a",
    "\x13\x14\x16\x1d", "a\x04b", "in\x04g", "\x7f", "\x80\x81\x9f", "\u00ad", "\u00ff\u00fe", "\u0130",
    "\u01c5", "\u0378", "\U00040000", "\U00080000x", "a" * 100, "ab" * 64, " " * 100, "\n" * 50, "1" * 60,
    "!" * 80, "😀" * 20, "the " * 40, "\t" * 33, "a " * 50, "=" * 79,
    "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch",
    "pneumonoultramicroscopicsilicovolcanoconiosis", "antidisestablishmentarianism",
    "supercalifragilisticexpialidocious", "xqzvjkw", "aAbBcCdD", "camelCaseIdentifier",
    "snake_case_identifier", "Q: What is the capital of France?\nA: Paris.", "user: hi\nassistant: hello",
    "<s>[INST] hi [/INST]", "</s>", "<unk>", "<|user|>", "<|", "|>", "<|im_start", "|im_end|>",
]

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|><|im_end|>", "a<|im_end|>b", " <|im_end|> ",
    "a <|im_end|> b", "<|im_end|>\n", "\n<|im_end|>", "  <|im_end|>  ",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n",
    "<repo_name>x<file_sep>y", "<reponame><filename>main.cpp<gh_stars>100",
    "<issue_start>a<issue_comment>b<issue_closed>",
    "<jupyter_start><jupyter_text>t<jupyter_code>c<jupyter_output>o<jupyter_script>", "<empty_output>",
    "<<|im_end|>>", "<|im_end|", "|im_end|>", "<|im_<|im_end|>", "<|im_start|>12<|im_end|>34", "<|IM_END|>",
    "<| im_end |>", "😀<|endoftext|>😀", "don<|im_end|>'t", "<|endoftext|><|endoftext|>", "é<repo_name>\u0301",
    "a<|endoftext|>\r\n<|endoftext|>b", "<filename>\x00<filename>",
]


def random_texts(count, seed):
    """Runs of characters of one kind, of different kinds in a row: where split rules go wrong."""
    choose = random.Random(seed)
    kinds = [
        "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", " ", " \t", "\r\n", "\n",
        "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
        "äöüßéèêçñ", "ÄÖÜÉÈÇÑ", "абвгде", "ΑΒΓαβγ", "中文字符漢", "ひらカタ", "한국어", "😀👍🏽❤️🎉", "\u0301\u0308\u0327",
        "٣٤५६", "½²①Ⅷ", "\u00a0\u2003\u3000\u2028\u0085",
        "\u200b\u200d\ufeff\u180e", "'", "'", "\x00\x01\x1b\x7f",
    ]
    common = ["the", " and", " of", "ing", "'s", "'ll", " don't", "return ", "://", "\r\n", "  ", "\n\n"]
    for _ in range(count):
        parts = []
        for _ in range(choose.randint(1, 12)):
            if choose.random() < 0.3:
                parts.append(choose.choice(common))
            else:
                kind = choose.choice(kinds)
                parts.append("".join(choose.choice(kind) for _ in range(choose.randint(1, 5))))
        yield "".join(parts)


def every_character():
    """All assigned code points, hundreds a text: between letters, after a space, doubled, before a digit.

    Unassigned ones are left out: libraries built with another version of Unicode classify them otherwise.
    """
    characters = (c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn"))
    while chunk := list(itertools.islice(characters, 300)):
        yield "".join(f"a{c}b {c}{c}1 " for c in chunk)


# ---- byte-level BPE ----------------------------------------------------------------------------------------


class Vocabulary:
    def __init__(self, path):
        fields = GGUFReader(path).fields
        self.tokens = fields["tokenizer.ggml.tokens"].contents()
        self.types = fields["tokenizer.ggml.token_type"].contents()
        self.merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
        self.pre = fields["tokenizer.ggml.pre"].contents()
        self.chat_template = fields["tokenizer.chat_template"].contents()
        self.bos = self.tokens[fields["tokenizer.ggml.bos_token_id"].contents()]
        self.eos = self.tokens[fields["tokenizer.ggml.eos_token_id"].contents()]

    def reference(self, special):
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=self.merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        if special:
            tokenizer.add_special_tokens([t for t, kind in zip(self.tokens, self.types) if kind == CONTROL])
        return tokenizer


def bpe_cases(vocabulary, texts, special_texts):
    if vocabulary.pre != "smollm":
        sys.exit(f"the reference is set up for the split rule smollm; {vocabulary.pre} needs its own")
    plain, special = vocabulary.reference(False), vocabulary.reference(True)
    cases = [{"text": t, "parse_special": False, "ids": plain.encode(t).ids} for t in texts]
    cases += [{"text": t, "parse_special": True, "ids": special.encode(t).ids} for t in special_texts]
    return cases


# ---- split rules -------------------------------------------------------------------------------------------

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def isolate(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def byte_level_words():
    return isolate(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


SPLITS = {
    "gpt-2": byte_level_words(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level_words()]),
    "llama-bpe": isolate(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL),
    "qwen2": isolate(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL),
    "tekken": isolate(rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+"
                      rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}" +
                      TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)),
}


def split_cases(texts):
    return [{"rule": rule, "text": text, "pieces": [piece for piece, _ in splitter.pre_tokenize_str(text)]}
            for rule, splitter in SPLITS.items() for text in texts]


# ---- SentencePiece -----------------------------------------------------------------------------------------

SENTENCEPIECE_MODELS = {
    "byte_fallback": dict(vocab_size=700, byte_fallback=True),
    "unknown_token": dict(vocab_size=400, byte_fallback=False),
    "user_defined": dict(vocab_size=700, byte_fallback=True, user_defined_symbols=["<|user|>", "<|user|>s",
    "@@"]),
    "no_space_prefix": dict(vocab_size=700, byte_fallback=True, add_dummy_prefix=False),
}


WITH_USER_DEFINED = ["<|user|>", "<|user|>hi", "hi <|user|>", "a<|user|>sb", "<|user|>s<|user|> s",
                     " <|user|>", "@@@", " @@", "a@@@@b", "@@\n<|user|>"]


def sentencepiece_models(corpus, texts):
    for name, options in SENTENCEPIECE_MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            prefix = str(Path(folder) / "model")
            sentencepiece.SentencePieceTrainer.train(
                input=corpus, model_prefix=prefix, model_type="bpe", normalization_rule_name="identity",
                remove_extra_whitespaces=False, character_coverage=1.0, minloglevel=2, num_threads=1,
                **options)
            data = Path(prefix + ".model").read_bytes()
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        yield {
            "name": name,
            "add_space_prefix": options.get("add_dummy_prefix", True),
            "unk": model.trainer_spec.unk_id, "bos": model.trainer_spec.bos_id,
            "eos": model.trainer_spec.eos_id,
            "tokens": [piece.piece for piece in model.pieces],
            "scores": [piece.score for piece in model.pieces],
            # SentencePiece numbers the types as GGUF does.
            "types": [piece.type for piece in model.pieces],
            "cases": [{"text": t, "ids": processor.encode(t)} for t in texts],
        }


# ---- running -----------------------------------------------------------------------------------------------


def record(folder, vocabulary, corpus, wide):
    texts = PLAIN + list(random_texts(1000 if wide else 40, seed=1))
    special = SPECIAL + ([a + b + c for a in SPECIAL for b in ("x ",
    "\n") for c in SPECIAL[:8]] if wide else [])
    long_text = Path(corpus).read_text(encoding="utf-8")
    splits = texts if wide else list(random_texts(40, seed=2)) + PLAIN[20:30]
    sentences = (texts if wide else texts[::2]) + WITH_USER_DEFINED + [long_text[:2000]]
    if wide:
        texts = texts + [long_text] + list(every_character())
        splits = splits + list(every_character())
    cases = bpe_cases(vocabulary, texts, special)
    write(folder / "tokenizer_smollm2.json", cases)
    write(folder / "tokenizer_splits.json", split_cases(splits))
    write(folder / "tokenizer_sentencepiece.json", list(sentencepiece_models(corpus, sentences)))
    write(folder / "chat_templates.json", list(chat_cases((vocabulary.chat_template, vocabulary.bos, vocabulary.eos))))
    return len(cases)


def main():
    arguments = argparse.ArgumentParser(description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", required=True, help="GGUF file with the vocabulary")
    arguments.add_argument("--corpus", required=True, help="plain text to train SentencePiece models on")
    arguments.add_argument("--write", metavar="FOLDER", type=Path, help="record the fixtures there")
    arguments.add_argument("--engine-tests", metavar="FILE", help="the built engine_tests: compare live")
    options = arguments.parse_args()
    if not options.write and not options.engine_tests:
        arguments.error("give --write, --engine-tests or both")
    vocabulary = Vocabulary(options.model)
    if options.write:
        count = record(options.write, vocabulary, options.corpus, wide=False)
        print(f"recorded {count} texts in {options.write}")
    if options.engine_tests:
        with tempfile.TemporaryDirectory() as folder:
            count = record(Path(folder), vocabulary, options.corpus, wide=True)
            print(f"comparing on {count} texts")
            environment = os.environ | {"COMPRESSKV_TOKENIZER_DATA": folder,
            "COMPRESSKV_TEST_MODEL": options.model}
            tests = "--gtest_filter=*Reference*"
            sys.exit(subprocess.run([options.engine_tests, tests], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
