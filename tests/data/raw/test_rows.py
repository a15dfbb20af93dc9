"""Encodings and forms of raw text and CSV files: read right, or refused with line and byte."""

from __future__ import annotations

import codecs

import pytest

from finlora.data.raw.rows import read_csv, read_jsonl, read_lines, read_text
from finlora.errors import DatasetError

NORDIC = "Yhtiö on Ålandsbanken .\nÉlan vital ñ @ 5 % ."


def write(folder, raw):
    path = folder / "raw.txt"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("published", ["latin-1", "utf-8"])
@pytest.mark.parametrize("saved", ["utf-8", "utf-8-sig"])
def test_utf8_is_read_whatever_was_published(tmp_path, published, saved):
    assert read_text(write(tmp_path, NORDIC.encode(saved)), published) == NORDIC


def test_latin1_is_read_where_it_was_published(tmp_path):
    assert read_text(write(tmp_path, NORDIC.encode("latin-1")), "latin-1") == NORDIC
    with pytest.raises(DatasetError, match=r"raw.txt:1: byte 0xf6 is not valid utf-8 \(byte 4 of the file\).*in utf-8"):
        read_text(write(tmp_path, NORDIC.encode("latin-1")), "utf-8")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("A\nprofit – up".encode("cp1252"), r":2: byte 0x96 is a control character in latin-1.*\(byte 9 of"),
        ("yhtiö".encode("cp850"), r":1: byte 0x94 is a control character"),
        ("yhtiö".encode("mac_roman"), r":1: byte 0x9a is a control character"),
        ("yhtiö\n".encode() + "yhtiö".encode("latin-1"), r":1: bytes 0xc3b6 are utf-8 in a file that is not .*byte 4"),
        (
            "x\nyhtiö".encode().decode("latin-1").encode(),
            r":2: found 'Ã¶', a character that was decoded with the wrong",
        ),
        ("yhti”".encode().decode("cp1252", "ignore").encode(), r"found 'â€', a character that was decoded with the"),
        (
            "x\nyhti\ufffd".encode(),
            r":2: found '\ufffd', a character that was decoded with the wrong encoding .*byte 6 of",
        ),
        ("yhtiö".encode("utf-16"), r":1: found a zero byte, which UTF-16 text .*byte 3"),
        ("yhtiö".encode("utf-32"), r":1: found a zero byte"),
        (b"a\nb\0c", r":2: found a zero byte.*byte 3"),
        (codecs.BOM_UTF8 + b"\n", "is empty"),
    ],
)
def test_other_encoding_is_refused_with_its_byte(tmp_path, raw, words):
    with pytest.raises(DatasetError, match=words):
        read_text(write(tmp_path, raw), "latin-1")


def test_published_marks_of_utf8_files_are_kept(tmp_path):
    """Tweets of TFNS hold texts that their authors had already broken."""
    assert read_text(write(tmp_path, "itÃ¢s \ufffd".encode()), "utf-8") == "itÃ¢s \ufffd"


def test_lines_end_by_either_systems_mark_alone(tmp_path):
    assert read_lines(write(tmp_path, b"a\r\nb\nc"), "utf-8") == ["a", "b", "c"]
    with pytest.raises(DatasetError, match=r"raw.txt:1: found a carriage return inside a line"):
        read_lines(write(tmp_path, b"a\rb\r"), "utf-8")


def test_byte_order_mark_is_no_part_of_a_row(tmp_path):
    assert read_lines(write(tmp_path, b"\xef\xbb\xbf-DOCSTART-"), "utf-8") == ["-DOCSTART-"]
    (row,) = read_jsonl(write(tmp_path, b'\xef\xbb\xbf{"text": "x"}\n'), ("text",))
    assert row.fields == {"text": "x"}
    (row,) = read_csv(write(tmp_path, b"\xef\xbb\xbftext\nx\n"), "utf-8", ("text",))
    assert row.fields == {"text": "x"}


def test_csv_columns_are_found_in_any_order_and_case(tmp_path):
    (row,) = read_csv(write(tmp_path, b"LABEL, Text ,id\n1,up,7\n"), "utf-8", ("text", "label"))
    assert (row.text("text"), row.text("label"), row.text("id")) == ("up", "1", "7")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("text;label\nup;1\n", r"raw.txt:1: found fields separated by ';', expected commas"),
        ("text\tlabel\nup\t1\n", r"raw.txt:1: found fields separated by '\\t'"),
        ("up,1\nflat,2\n", "found columns up, 1, but text, label is missing.*with its header line"),
        ("text,label,TEXT\nup,1,2\n", "found two columns 'text', expected one"),
        ("text,label\n\nup,1\n", "raw.txt:2, column text: found 0 fields, expected 2"),
        ('text,label\n"up"x,1\n', "raw.txt:2: not valid CSV"),
        ('text,label\nup,1\n"flat,2\nup,1\n', "raw.txt:3: not valid CSV"),
    ],
)
def test_csv_of_another_form_is_refused(tmp_path, body, words):
    with pytest.raises(DatasetError, match=words):
        read_csv(write(tmp_path, body.encode()), "utf-8", ("text", "label"))
