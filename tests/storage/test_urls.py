"""URLs without secrets: logins, tokens and signatures of every form, and URLs that have none."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelclip.storage.urls import has_secret, public, public_url, scrubbed

SCHEMES = ["http", "https", "HTTPS", "ssh", "git+https", "postgresql+psycopg2", "mysql", "redis", "ftp", "s3"]
PREFIXES = ["", "ViT-B-16:", "coco-stuff:"]
USERS = st.text("abcXYZ019_-%.", max_size=6)
PASSWORDS = st.text("abcXYZ019_-%.@/:?#&= é'\\", min_size=1, max_size=9)


@given(st.sampled_from(SCHEMES), st.sampled_from(PREFIXES), USERS, PASSWORDS)
def test_password_is_removed(scheme, prefix, user, password):
    if user == "localhost" or "." in user:  # cannot be told from a host with a port
        user = "user"
    for end in ("", ":5432", ":5432/path/file.pth"):
        url = f"{prefix}{scheme}://{user}:{password}@host.example{end}"
        assert public_url(url) == f"{prefix}{scheme}://host.example{end}"
        assert has_secret(url)


@pytest.mark.parametrize("token", ["token", "hf_a1b2", "x-access-token", "a%40b", "a.b"])
@pytest.mark.parametrize("scheme", ["https", "git+https"])
def test_token_is_removed(scheme, token):
    assert public_url(f"{scheme}://{token}@host/a@b.git") == f"{scheme}://host/a@b.git"
    assert has_secret(f"{scheme}://{token}@host/a.git")


@given(st.text(min_size=1))
def test_query_and_fragment_are_removed(secret):
    for mark in ("?token=", "?X-Amz-Date=1&X-Amz-Signature=", "?", "#", "?a=1#"):
        url = f"https://host/weights.pth{mark}{secret}"
        assert public_url(url) == "https://host/weights.pth"
        assert has_secret(url)


@pytest.mark.parametrize(
    "text",
    [
        *("", "toy", "ViT-B-16:openai", "/a/b@c:d?e#f", "git@host:a/b.git", "a@b.example"),
        *("https://host/a@b.git", "http://minio:9000/a", "http://localhost:8080/a@1.0/b", "http://10.0.0.1:5000/a@b"),
        *("http://[::1]:80/a@b", "https://host.example:443", "s3://bucket/a@b?c#d/e:f", "file:///a:b@c?d#e"),
        *("sqlite:////a:b/c@d.db", "sqlite:///runs/mlflow.db", "://"),
    ],
)
def test_text_without_secret_is_unchanged(text):
    assert public_url(text) == text and not has_secret(text)


@given(st.text("ab:/@?#.[]1 "), st.sampled_from(SCHEMES))
def test_cleaning_twice_changes_nothing(rest, scheme):
    once = public_url(f"{scheme}://{rest}")
    assert public_url(once) == once


def test_user_of_ssh_is_no_secret():
    assert public_url("ssh://git@host.example:22/a@b") == "ssh://host.example:22/a@b" and not has_secret(
        "ssh://git@host.example:22/a@b"
    )
    assert has_secret("ssh://git:pw@host/a")


def test_documents_are_cleaned_at_every_depth():
    document = {"a": ["https://u:p@h/x?y", {"b": ("s3://b/k?", 1, None, True)}], "c": 0.5}
    assert public(document) == {"a": ["https://h/x", {"b": ["s3://b/k?", 1, None, True]}], "c": 0.5}


@pytest.mark.parametrize("password", ["geheim", "p@ss/w:rd", "a?b#c", "x", "ge%68eim"])
def test_messages_of_libraries_are_cleaned(password):
    url = f"https://user:{password}@host.example/data.git?token=abc123"
    for part in [*re.split("[@/:?#]", password), "abc123", password, url]:
        text = scrubbed(f"cannot read {url}: nonnumeric port: '{part}' ({part})", url)
        assert text.startswith("cannot read https://host.example/data.git")
        assert f"'{part}'" not in text and f"({part})" not in text
    text = scrubbed(f"GET {url}; see http://docs.example:80/a")
    assert text == "GET https://host.example/data.git see http://docs.example:80/a"
    assert scrubbed("no URL at all: 1/2 a@b") == "no URL at all: 1/2 a@b"
