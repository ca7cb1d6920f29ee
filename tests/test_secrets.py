"""No committed file, and no file that runs and notebooks left here, holds what looks like a key."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = r"API_?KEY|api_?key|SECRET|secret|PASSWORD|password|ACCESS_TOKEN|HF_TOKEN"
KEYS = {
    "Hugging Face": r"\bhf_[A-Za-z0-9]{20,}",
    "OpenAI": r"\bsk-[A-Za-z0-9_-]{20,}",
    "AWS": r"\bAKIA[0-9A-Z]{16}\b",
    "GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "Google": r"\bAIza[0-9A-Za-z_-]{35}",
    "Slack": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "bearer": r"\b[Aa]uthorization\W{1,4}[Bb]earer\s+[A-Za-z0-9._~+/-]{20,}",
    "named": rf"\b[A-Za-z_]*(?:{NAMES})\b[\"']?\s*[=:]\s*"
    r"[\"']?(?=[^\s\"']*\d)[A-Za-z0-9_/+-]{20,}",
}
PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in KEYS.values()))
# What a run writes; not all of it is committed.
OUTPUTS = ("runs", "figures", "data/results", "notebooks", "bench/results")
TEXTS = set(".json .jsonl .csv .ipynb .html .md .log .txt .yml .yaml .toml .py .sh .svg".split())
# The tests of endpoints send it, and check that it is written nowhere.
ALLOWED = "sk-a-secret-that-must-not-be-seen"


def keys_in(text):
    return [match[0] for match in PATTERN.finditer(text) if ALLOWED not in match[0]]


def committed_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def output_files():
    return [path for folder in OUTPUTS for path in (ROOT / folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize("files", [committed_files, output_files])
def test_no_key_stands_in_a_file(files):
    keys_of = {}
    for path in files():
        if path.suffix in TEXTS | {""} and path.exists() and path.stat().st_size < 20_000_000:
            if keys := keys_in(path.read_text(encoding="utf-8", errors="replace")):
                keys_of[str(path.relative_to(ROOT))] = [key[:8] + "..." for key in keys]
    assert not keys_of, f"remove these, and revoke them where they came from: {keys_of}"


EXAMPLES = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "OpenAI": "sk-" + "proj-" + "x1Y2" * 8,
    "AWS": "AKIA" + "ABCDEFGH12345678",
    "GitHub": "ghp_" + "a1B2" * 9,
    "Google": "AIza" + "Sy" + "a1B" * 11,
    "Slack": "xoxb-" + "1234567890-abc",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "bearer": "Authorization: " + "Bearer " + "abc.DEF-123" * 2,
    "named": "MY_API_KEY" + '="' + "abcdef1234567890abcdef" + '"',
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_planted_key_is_found(kind):
    assert keys_in(f'{{"output": "before {EXAMPLES[kind]} after"}}')
    assert not keys_in("hf_hub, sk-learn, AKIA, ghp_")
