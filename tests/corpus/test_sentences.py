"""Sentences of any script: where they end, what is too short, what is cut."""

import unicodedata
from collections import Counter

import pytest

from lvm.corpus.sentences import num_words, script_language, split_sentences

PAGES = {
    "Latin": ["Die Brücke über den Fluß wurde gestern eröffnet.", "Çocuklar bahçede top oynuyor."],
    "Cyrillic": ["Поезд пришёл вовремя сегодня утром.", "Мы ждём вас на вокзале!"],
    "Greek": ["Το πλοίο φεύγει στις οκτώ το βράδυ.", "Πού είναι το λιμάνι της πόλης;"],
    "Arabic": ["وصل القطار إلى المحطة في الموعد.", "هل رأيت الكتاب الجديد؟"],
    "Hebrew": ["הספר החדש מונח על השולחן.", "מתי יוצאת הרכבת לחיפה?"],
    "Devanagari": ["नदी के किनारे एक पुराना मंदिर है।", "क्या आपने वह किताब पढ़ी?"],
    "Tamil": ["மழை பெய்ததால் ஆறு நிரம்பியது.", "அவர்கள் நாளை வருவார்கள்."],
    "Burmese": ["ကလေးများသည် ပန်းခြံတွင် ကစားနေကြသည်။", "ကျွန်ုပ်တို့ စျေးသို့ သွားကြမည်။"],
    "Tibetan": ["དེ་རིང་གནམ་གཤིས་ཧ་ཅང་བཟང་པོ་འདུག།", "ང་ཚོ་ཁྲོམ་ལ་འགྲོ་གི་ཡིན།"],
    "Urdu": ["بچے باغ میں کھیل رہے ہیں۔", "ہم بازار جا رہے ہیں؟"],
    "Korean": ["오늘은 날씨가 아주 좋습니다.", "우리는 시장에 갑니다."],
    "Amharic": ["ልጆቹ በመናፈሻ ውስጥ ይጫወታሉ።", "እኛ ወደ ገበያ እንሄዳለን።"],
    "Thai": ["แม่น้ำสายนี้ไหลผ่านเมืองหลวง", "ชาวบ้านปลูกข้าวทุกปี"],
    "Han": ["这条河穿过了整个城市。", "你读过那本新书吗？", "火车八点到站！"],
    "Kana": ["この川は町の中を流れています。", "新しい本を読みましたか？"],
    "Hangul": ["기차가 제시간에 도착했다.", "강은 도시를 지나간다."],
    "Khmer": ["ទន្លេនេះហូរកាត់ទីក្រុង។", "រថភ្លើងមកដល់ទាន់ពេល។"],
}


@pytest.mark.parametrize("script", PAGES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_every_sentence_of_a_page_is_a_row(script: str, form: str) -> None:
    sentences = PAGES[script]
    joint = "" if script in ("Han", "Kana") else " "
    page = unicodedata.normalize("NFC", joint.join(sentences))
    dropped: Counter[str] = Counter()
    found = split_sentences(unicodedata.normalize(form, page), dropped=dropped)
    assert [unicodedata.normalize("NFC", one) for one in found] == sentences and not dropped


def test_scripts_may_be_mixed_in_one_text() -> None:
    page = "\n\n".join(sentence for sentences in PAGES.values() for sentence in sentences)
    assert split_sentences(page) == [s for sentences in PAGES.values() for s in sentences]


def test_what_is_dropped_is_counted_by_reason() -> None:
    dropped: Counter[str] = Counter()
    lines = ["Yes.", "1 2 3 4 five 6 seven 8 nine.", "foo(bar, baz, the, qux)", "是的。"]
    text = "\n\n".join([*lines, "This one stays here."])
    assert split_sentences(text, dropped=dropped) == ["This one stays here."]
    assert dropped == {"fewer than 3 words": 2, "mostly digits or signs": 1, "reads as code": 1}


def test_lines_of_chinese_are_joined_without_a_space() -> None:
    assert split_sentences("这条河穿过\n了整个城市。") == ["这条河穿过了整个城市。"]
    assert split_sentences("This river\nruns on.") == ["This river runs on."]


def test_a_call_in_another_script_is_no_code() -> None:
    sentence = "北京(中国的首都)是一座城市。"
    assert split_sentences(sentence) == [sentence]


def test_long_sentences_without_spaces_are_cut_at_clauses() -> None:
    clause = "河水流过城市和田野以后来到了海边"
    sentence = "，".join([clause] * 9) + "。"
    pieces = split_sentences(sentence)
    assert "".join(pieces) == sentence and len(pieces) == 4
    assert all(num_words(piece) <= 60 for piece in pieces)
    assert all(piece[-1] in "，。" for piece in pieces)
    unbroken = split_sentences("เมืองหลวง" * 60)
    assert "".join(unbroken) == "เมืองหลวง" * 60
    assert not any(unicodedata.category(piece[0]) == "Mn" for piece in unbroken)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("plain words", "en"),
        ("Žluťoučký kůň", "en"),
        ("漢字", "zh"),
        ("漢字かな", "ja"),
        ("русский текст", "ru"),
        ("a long English line with 漢", "en"),
    ],
)
def test_the_language_follows_from_the_script(text: str, language: str) -> None:
    assert script_language(text) == language


def test_an_odd_quotation_mark_joins_no_sentences_far_behind_it() -> None:
    """One in a text of one line would pair with the next, through hundreds of sentences."""
    text = 'The mark " stands alone in this one. ' + "Each of them has six words. " * 2000
    assert split_sentences(text)[-1900:] == ["Each of them has six words."] * 1900
    assert "".join(split_sentences(text)).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("part", ["`", "![", "句子很長沒有句號", "word ", "This ends. "])
def test_a_long_paragraph_loses_nothing(part: str) -> None:
    text = f"It begins with these words {part * 3000} and with these it ends."
    found = split_sentences(text, dropped=(dropped := Counter()))
    assert dropped or "".join(found).replace(" ", "") == text.replace(" ", "")


def test_a_short_end_of_a_line_of_thai_stays_with_it() -> None:
    text = "แม่น้ำสายนี้ไหลผ่านเมืองหลวง ชาวบ้านปลูกข้าวทุกปี ทุกวัน"
    assert split_sentences(text) == ["แม่น้ำสายนี้ไหลผ่านเมืองหลวง", "ชาวบ้านปลูกข้าวทุกปี ทุกวัน"]
