import pandas as pd
import pytest

from recbole_uip import texts
from recbole_uip.settings import SettingsError
from recbole_uip.texts import bag_of_words, item_texts

TOKENS = {"[PAD]": 0, "a": 1, "b": 2, "c": 3, "d": 4}


@pytest.fixture
def item_file(tmp_path):
    path = tmp_path / "x.item"
    path.write_text(
        "item_id:token\ttitle:token_seq\tgenre:token_seq\n"
        'a\t"Great" Film\tDrama\n'
        'b\t"Open quote\t\n'
        "c\t\t\n"
        "z\tNot in the data\tDrama\n",
        encoding="utf-8",
    )
    return path


def test_item_texts(item_file):
    texts = item_texts(item_file, "{title} ({genre})", "item_id", TOKENS, 5)
    assert texts == [None, '"Great" Film (Drama)', '"Open quote', None, None]


def test_texts_of_any_length(item_file):
    long = "word " * 50_000
    item_file.write_text(f"item_id:token\ttitle:token_seq\na\t{long}\n", encoding="utf-8")
    texts = item_texts(item_file, "{title}", "item_id", TOKENS, 2)
    assert texts == [None, long.strip()]


def test_an_item_twice_has_its_first_text(item_file):
    with item_file.open("a", encoding="utf-8") as file:
        file.write("a\tAnother Film\tDrama\nc\tLate\tDrama\n")
    texts = item_texts(item_file, "{title} ({genre})", "item_id", TOKENS, 5)
    assert texts == [None, '"Great" Film (Drama)', '"Open quote', "Late (Drama)", None]


def test_quoted_separators_and_quotation_marks(item_file):
    item_file.write_text(
        "item_id:token\ttitle:token_seq\tgenre:token_seq\n"
        'a\t"A\tTab"\tDrama\n'
        'b\t"A ""quoted"" film"\tDrama\n',
        encoding="utf-8",
    )
    texts = item_texts(item_file, "{title} ({genre})", "item_id", TOKENS, 3)
    assert texts == [None, "A Tab (Drama)", 'A "quoted" film (Drama)']


def test_a_row_with_more_fields_than_the_header_is_named(item_file):
    with item_file.open("a", encoding="utf-8") as file:
        file.write("d\tTabs\tin it\tDrama\n")
    with pytest.raises(SettingsError, match="x.item: row 6 has 4 fields, and the header 3"):
        item_texts(item_file, "{title}", "item_id", TOKENS, 5)


def test_a_field_the_file_lacks_is_an_error(item_file):
    with pytest.raises(SettingsError, match="'year'.*item_id, title, genre"):
        item_texts(item_file, "{title} {year}", "item_id", TOKENS, 5)


def test_no_item_file(tmp_path):
    assert item_texts(tmp_path / "no.item", "{title}", "item_id", TOKENS, 5) == [None] * 5


def test_csv_and_parquet(tmp_path):
    table = pd.DataFrame({"item_id": ["a", "b"], "title": ['One, "two"', None], "year": [1999, 7]})
    table.to_csv(tmp_path / "items.csv", index=False)
    table.to_parquet(tmp_path / "items.parquet")
    expected = [None, 'One, "two" (1999)', "(7)", None, None]
    arguments = ("{title} ({year})", "item_id", TOKENS, 5)
    assert item_texts(tmp_path / "items.csv", *arguments, separator=",") == expected
    assert item_texts(tmp_path / "items.parquet", *arguments) == expected


def test_bags_of_words():
    bags, vocabulary = bag_of_words(["Toy Story (1995)", "A Story; a STORY", "Ça 2"])
    assert vocabulary == ["1995", "2", "a", "story", "toy", "ça"]
    assert bags.tolist() == [[1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1]]
    # New texts keep the columns, whatever words they have.
    again, same = bag_of_words(["story of a toy"], vocabulary)
    assert same == vocabulary and again.tolist() == [[0, 0, 1, 1, 1, 0]]


def test_the_most_frequent_words_count(monkeypatch):
    monkeypatch.setattr(texts, "MAX_WORDS", 2)
    bags, vocabulary = bag_of_words(["x a b", "a b", "y b a"])
    assert vocabulary == ["a", "b"] and bags.shape == (3, 2)
