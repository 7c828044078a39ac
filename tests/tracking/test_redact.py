from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tracking.config import (
    Redactor,
    masked_uri,
    secrets_of,
    sqlite_path,
    store_identity,
    without_credentials,
)

PLAIN = st.text(string.ascii_letters + string.digits, min_size=6, max_size=20).map(lambda s: "Zq" + s)


@given(user=PLAIN, password=PLAIN, before=st.text(max_size=20), after=st.text(max_size=20))
def test_the_password_of_a_uri_never_survives_in_any_text(user: str, password: str, before: str, after: str) -> None:
    uri = f"https://{user}:{password}@tracking.example.org:5000/base"
    redact = Redactor(secrets_of(uri))
    assert password not in redact(f"{before} {uri} {after} {password}")
    assert password not in masked_uri(uri)
    assert password not in without_credentials(uri)
    assert password not in store_identity(uri)


def test_a_percent_encoded_password_is_known_in_both_spellings() -> None:
    redact = Redactor(secrets_of("https://me:p%40ss%2Fword@host/"))
    assert redact("sent p@ss/word and p%40ss%2Fword") == "sent *** and ***"


def test_uris_of_others_lose_their_user_part_and_keep_the_rest() -> None:
    assert Redactor()("from s3://KEYID:abc+def@bucket/prefix on") == "from s3://***@bucket/prefix on"


def test_pairs_with_telling_names_are_masked_and_others_are_not() -> None:
    text = "https://b/x?X-Amz-Signature=abcdef&part=3 password=hunter22 train.max_tokens=77"
    assert Redactor()(text) == "https://b/x?X-Amz-Signature=***&part=3 password=*** train.max_tokens=77"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://a.blob/x?sv=1&sig=abc%2Fdef&se=2", "https://a.blob/x?sv=1&sig=***&se=2"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("header authorization: Basic dXNlcjpwdw==", "header authorization: Basic ***"),
        ("https://b/x?X-Amz-Security-Token=abc&X-Amz-Credential=AKIA/1", "https://b/x?X-Amz-Security-Token=***"
         "&X-Amz-Credential=***"),
        ("simplecache::https://u:pw@host/x::s3://k:s@b", "simplecache::https://***@host/x::s3://***@b"),
        ("the bearer of design=3 signs", "the bearer *** design=3 signs"),
    ],
)  # fmt: skip
def test_signatures_bearers_and_chains_are_masked(text: str, shown: str) -> None:
    assert Redactor()(text) == shown


def test_secrets_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert Redactor.for_uri("sqlite:///x.db")("key planted-secret-value is false") == "key *** is false"


def test_a_malformed_uri_is_masked_up_to_its_last_at_sign() -> None:
    assert masked_uri("http://user:pa/ss@host:port/x") == "http://***@host:port/x"
    assert secrets_of("http://[broken") == set()


def test_two_spellings_of_one_store_have_one_identity(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_identity("sqlite:///a.db") == store_identity(f"sqlite:///{tmp_path}/a.db")
    assert store_identity("http://u:secret@h:5000/") == store_identity("http://h:5000") == "http://h:5000"
    assert sqlite_path("http://h") is None
