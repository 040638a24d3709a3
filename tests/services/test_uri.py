"""Tests which URIs of users the service may read."""

from pathlib import Path

import pytest

from services.uri import InvalidUri, admitted, is_folder, matches, names_organization

DEFAULT = ["https://", "hf://datasets/"]


@pytest.mark.parametrize(
    ("uri", "prefixes"),
    [
        ("https://example.com/rows.jsonl?token=x", DEFAULT),
        ("https://EXAMPLE.com:443/rows.jsonl", ["https://example.com/"]),
        ("https://example.com/a/rows.jsonl", ["https://example.com/a"]),
        ("http://example.com:8000/rows.jsonl", ["http://example.com:8000/"]),
        ("https://gitlab.com/files/data%2Frows.jsonl/raw", DEFAULT),
        ("hf://datasets/org/name/data/*.parquet", DEFAULT),
        ("hf://datasets/org/name@v1/rows.jsonl", ["hf://datasets/org/name"]),
        ("hf://datasets/org/name@refs/convert/parquet/default/", DEFAULT),
        ("s3://bucket/rows/a.jsonl", ["s3://bucket/rows/"]),
        ("s3://bucket/r%6Fws/a.jsonl", ["s3://bucket/rows/"]),
        ("s3://bucket/any", ["s3://"]),
        ("s3://b/a?scheme=http&endpoint_override=h:1", ["s3://b/?endpoint_override=h%3A1&scheme=http"]),
        ("gs://bucket/rows/", ["gs://bucket/rows/"]),
    ],
)
def test_a_uri_under_a_prefix_is_admitted(uri: str, prefixes: list[str]) -> None:
    assert admitted(uri, prefixes) == uri


@pytest.mark.parametrize(
    ("uri", "prefixes"),
    [
        ("http://example.com/rows.jsonl", DEFAULT),
        ("s3://bucket/rows.jsonl", DEFAULT),
        ("gs://bucket/rows.jsonl", DEFAULT),
        ("file:///etc/passwd", DEFAULT),
        ("hf://models/org/name/rows.jsonl", DEFAULT),
        ("https://example.com/rows.jsonl", []),
        ("https://example.com.evil.org/rows.jsonl", ["https://example.com"]),
        ("https://example.com:8443/rows.jsonl", ["https://example.com/"]),
        ("https://example.com/public-not/rows.jsonl", ["https://example.com/public"]),
        ("s3://bucket2/rows.jsonl", ["s3://bucket"]),
        ("s3://bucket/rows-of-others/a.jsonl", ["s3://bucket/rows"]),
        ("s3://bucket/rows/a.jsonl?endpoint_override=evil.org", ["s3://bucket/rows/"]),
        ("s3://bucket/rows/a.jsonl", ["s3://bucket/rows/?endpoint_override=minio%3A9000"]),
        ("hf://datasets/org/name-of-another/rows.jsonl", ["hf://datasets/org/name"]),
    ],
)
def test_any_other_is_refused_with_the_uri_the_prefixes_and_the_remedy(uri: str, prefixes: list[str]) -> None:
    with pytest.raises(InvalidUri) as refused:
        admitted(uri, prefixes)
    assert all(part in str(refused.value) for part in [uri, "dataset_uris", *prefixes])


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("https://user:secret@example.com/rows.jsonl", "contains credentials"),
        ("s3://key:secret@bucket/rows.jsonl", "contains credentials"),
        ("https://example.com\\@evil.org/rows.jsonl", "backslash"),
        ("https://example.com/rows.jsonl#@evil.org", "'#'"),
        ("https://example.com/\nrows.jsonl", "control character"),
        ("https://exa\u00admple.com/rows.jsonl", "control character"),
        ("https://1２7.0.0.1/rows.jsonl", "ASCII"),
        ("https://%31%32%37.0.0.1/rows.jsonl", "ASCII"),
        ("https://[::1/rows.jsonl", "not a valid URI"),
        ("https://example.com:x/rows.jsonl", "not a valid URI"),
        ("https://example.com/a/../b/rows.jsonl", "'..'"),
        ("https://example.com/a/%2e%2E/b/rows.jsonl", "'..'"),
        ("https://example.com/a/..%2fb/rows.jsonl", "'..'"),
        ("s3://bucket/rows/%2e%2e/other/a.jsonl", "'..'"),
        ("s3://bucket/rows/a%00.jsonl", "NUL"),
        ("https:///rows.jsonl", "no host"),
        ("s3:///rows.jsonl", "no bucket"),
        ("https:rows.jsonl", "begin with"),
        ("ftp://example.com/rows.jsonl", "begin with"),
        ("fsspec+memory://rows.jsonl", "begin with"),
        ("rows.jsonl", "begin with"),
        ("file://host/rows.jsonl", "file:///<path>"),
        ("https://example.com/rows/", "names a folder"),
        ("https://example.com/*.jsonl", "names a folder"),
        ("hf://datasets/name/", "<organization>"),
        ("https://example.com/" + "a" * 9000, "limit is 8192"),
    ],
)
def test_a_uri_that_can_be_misread_is_refused_even_where_everything_is_admitted(uri: str, message: str) -> None:
    with pytest.raises(InvalidUri) as refused:
        admitted(uri, ["https://", "http://", "hf://", "s3://", "gs://", "file:///"])
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_local_file_is_compared_and_read_where_it_really_is(tmp_path: Path) -> None:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "secret.jsonl").write_text("{}")
    (tmp_path / "data" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "other").symlink_to(tmp_path / "data")
    data = f"{(tmp_path / 'data').as_uri()}/"
    assert admitted(f"{data}inner/../a%20b.jsonl", [data]) == f"{data}a%20b.jsonl"
    assert admitted(f"{tmp_path.as_uri()}/other/a.jsonl", [data]) == f"{data}a.jsonl"
    assert admitted(f"{data}a.jsonl", [f"{tmp_path.as_uri()}/other"]) == f"{data}a.jsonl"
    for uri in ("link.jsonl", "../secret.jsonl", "%2e%2e/secret.jsonl", "../data2/a.jsonl"):
        with pytest.raises(InvalidUri, match="not allowed"):
            admitted(data + uri, [data])


def test_a_folders_uri_means_the_files_that_its_last_part_matches() -> None:
    assert [is_folder(f"s3://b/{path}") for path in ("a/", "a/*.gz", "a/b", "a*/b", "a/b?x=*")] == [1, 1, 0, 0, 0]
    names = ["a.jsonl", "b.jsonl.gz", "_SUCCESS", ".hidden", "c/d.jsonl", "a[1].jsonl"]
    assert [name for name in names if matches("", name)] == ["a.jsonl", "b.jsonl.gz", "a[1].jsonl"]
    assert [name for name in names if matches("*.jsonl", name)] == ["a.jsonl", "a[1].jsonl"]
    assert [name for name in names if matches("a[1]*", name)] == ["a[1].jsonl"]


def test_an_organization_is_named_by_a_prefix_that_says_whose_dataset_it_is() -> None:
    uri = "hf://datasets/acme/rows/a.jsonl"
    assert names_organization(uri, ["https://", "hf://datasets/acme/"])
    assert names_organization(uri, ["hf://datasets/acme"])
    assert names_organization(uri, ["hf://datasets/acme/rows"])
    assert not names_organization(uri, ["https://", "hf://datasets/"])
    assert not names_organization("hf://datasets/acme-evil/rows/a.jsonl", ["hf://datasets/acme", "hf://datasets/"])
