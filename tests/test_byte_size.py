import pytest

from grok1.host.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("80GB", 80_000_000_000),
        ("80 gb", 80_000_000_000),
        ("80G", 80_000_000_000),
        ("2GiB", 2 << 30),
        ("2gi", 2 << 30),
        ("1.5T", 1_500_000_000_000),
        ("512kB", 512_000),
        (" 0.25MiB ", 1 << 18),
        ("12B", 12),
    ],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "1,5GB", "1 GBs", "80XB", "inf", "9" * 30, "٣GB"])
def test_invalid_sizes(text):
    with pytest.raises(ValueError, match=r"invalid size .*, expected a number and a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (40_330_000_000, "40.3 GB"),
        (318_239_886_140, "318 GB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (2_500_000_000_000_000, "2,500 TB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text
