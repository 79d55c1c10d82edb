"""Hypothesis strategies of text in all scripts, with what tokenizers are known to stumble over."""

from hypothesis import strategies as st

HAN = "的一是不了人我在有他这中大来上国漢字龥龦鿿㐀豈𠀋"
MARKS = "，。、！？；：（）「」『』《》【】“”‘’…—·～〜・ー゠〇〆々〻ヽゝ゛゜"
SPACES = ["\u3000", "\u00a0", "\u2003", "\u2028", "\u0085", "\u1680", "\u2000", " ", "  ", "\n", "\r\n", "\t", "\x00", "\x1c"]
UNSEEN = ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u202e", "\u200f", "\ufe0e", "\ufe0f", "\U000e0100"]
COMBINING = [
    "\u0301",
    "\u0327",
    "\u0338",
    "\u20e3",
    "\u3099",
    "\u309a",
    "\u0e49",
    "\u093f",
    "\u094d",
    "\u05b4",
    "\u0651",
    "\u1161",
    "\u11a8",
]
EMOJI = ["🙂", "👍🏽", "👩\u200d💻", "❤\ufe0f", "🇯🇵", "1\ufe0f\u20e3", "👨\u200d👩\u200d👧", "\U0001f1e6"]
SCRIPTS = [
    "한국어",
    "\u1100\u1161\u11a8",
    "ㄱㅏ",
    "שלום",
    "مرحبا",
    "Привет",
    "й",
    "ελληνικά",
    "हिन्दी",
    "ไทย",
    "か\u3099",
    "ﾊﾟ",
    "㍿",
    "ﷺ",
    "ꙮ",
]
LATIN = [
    "the",
    " word",
    "don't",
    "I'LL",
    "'s",
    "'\u017f",
    "'\u017fx",
    "é",
    "ﬁ",
    "ﬆ",
    "\u212b",
    "ß",
    "İ",
    "K",
    "ǅ",
    "ª",
    "ʰ",
    "x=1",
    "XMLBody",
    "ÀÉè's",
    "B\u0301'd",
    "a/b/\n/",
]
NUMBERS = ["２０２６", "１", "1234567", "٣٤", "Ⅷ", "½", "²", "㊂"]

_part = st.one_of(
    st.text(alphabet=HAN, min_size=1, max_size=12),
    st.sampled_from(list(MARKS)),
    st.sampled_from([*SPACES, *UNSEEN, *COMBINING]),
    st.sampled_from([*EMOJI, *SCRIPTS, *LATIN, *NUMBERS]),
    st.text(alphabet="あいうアイウエー・、。゛", max_size=8),
    st.text(max_size=3),
)
# Short texts of all that, and long ones mostly without spaces.
unicode_texts = st.lists(_part, max_size=14).map("".join)
cjk_texts = st.lists(st.text(alphabet=HAN[:14], min_size=1, max_size=40) | _part, max_size=30).map("".join)
