"""The rules of the caption tokenizer, found by feeding Stanford CoreNLP 3.4.1 strings and watching what it does.

A rule is a pair of regular expressions: the token, and the context that must follow it. Of all rules that match
at a position the longest match wins, context included, and of equally long ones the first. So order matters only
where it is said.
"""

from __future__ import annotations

import re
import unicodedata

_SPLIT_WORDS = (("can", "not"), ("gon", "na"), ("got", "ta"), ("wan", "na"), ("lem", "me"), ("gim", "me"))

# Abbreviations that keep their period: all of up to five letters that the tokenizer knows, and the longer ones found.
# After the period of a loose one, two more letters turn everything into one word.
_LOOSE_ABBREVIATIONS = (
    "al co ct ga jr ky md mo rd rt sq sr va vt ala apr aug bhd cos dak dec esq est etc ext feb fla fri inc ind jan jul "
    "jun kan ltd mar mon neb nev nov oct plc sep seq sys tel thu tue wed wis wyo ariz assn bldg blvd bros colo conn "
    "corp intl kans mich minn mont okla penn sept tenn tues univ wisc calif thurs bancorp ph.d ed.d"
)
_ABBREVIATIONS = (
    "cf dr ft lt mr ms mt ph st vs wm adj adm adv ave cie col cpl det drs ens gen gov hon jos maj mme mrs pfc pvt rep "
    "rev sen sfc sgt spc ste alex asst atty brig capt cmdr dept elec govs insp invt mlle msgr natl pres prof reps sens "
    "supt assoc attys comdr lieut profs supts treas messrs"
)
_LOOSE_CAPITALISED = "Az La Pa Ark Del Ill Mass Miss Ore Tex Wash"
_NUMBER_ABBREVIATIONS = "ca no op pp art fig nos figs prop"  # "no. 8", but "he said no."
# After a single letter with a period: "by J. The dog" ends a sentence, "by J. Smith" does not.
_SENTENCE_STARTS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)
_FILE_ENDINGS = (
    "c h x gz pl ps py bat bmp cgi cpp dll doc exe gif htm jar jpg mov pdf php png ppt sql tar txt wav xml zip docx "
    "html java jpeg"
)

# Combining marks and the like that continue a word although Unicode does not call them letters.
_MARKS = (
    "\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0384\u0385\u03f6\u0483-\u0487\u055a-\u055f"
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u06e7-\u06ed"
    "\u0730-\u074c\u07a6-\u07b0\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc-\u09cd"
    "\u0a01-\u0a03\u0a3c-\u0a4f\u0a81-\u0a83\u0abc-\u0acd\u0b82\u0bbe-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d48"
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
# One-character tokens. What is neither here nor part of another rule is dropped: emoji, control codes.
_SYMBOLS = (
    "-$%&*+,./:;<=>?@!|~\\\\\\^\\[\\](){}\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bf\u00d7\u00f7\u037e\u0387"
    "\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4"
    "\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042"
    "\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a4\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125"
    "\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)


def _letters() -> str:
    """Return the letters of Unicode's first plane as ranges for a regular expression's `[...]`."""
    ranges: list[list[int]] = []
    for code in range(0x10000):
        if unicodedata.category(chr(code))[0] == "L":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)


def _any_of(words: str) -> str:
    return f"(?:{'|'.join(re.escape(word) for word in sorted(words.split(), key=len, reverse=True))})"


_PLAIN = _letters()
_LETTER = f"[{_PLAIN}]"
_ALNUM = f"[{_PLAIN}{_MARKS}\\d]"
_APOSTROPHE = "(?:['\u0092\u2019]|&apos;)"
_QUOTE = "(?:['`\u0091\u0092\u2018\u2019\u201b]|&apos;)"
_ENDING = f"{_APOSTROPHE}(?i:[msd]|re|ve|ll)"
_NUMBER = r"(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)"
_ACRONYM = r"(?:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R)|[A-Za-z](?:\.[A-Za-z])+)"
_WORD = f"(?:[{_PLAIN}{_MARKS}]|&[aeiouAEIOU](?:acute|grave|uml);){_ALNUM}*(?:[.!?][{_PLAIN}{_MARKS}]{_ALNUM}*)*"
_PART = f"(?:[dDoOlL]{_QUOTE}{_ALNUM})?{_ALNUM}+"
_COMPOUND = f"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_CHAIN = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+"
_INITIALS = "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
_TAG = (
    r"</?[A-Za-z][A-Za-z0-9:.-]*"
    r"""(?: +(?:[A-Za-z][A-Za-z0-9:.-]*(?:=(?:'[^'\n]*'|"[^"\n]*"))?)?)* */?>|<[!?][A-Za-z-][^>\r\n]*>"""
)


def _word_rules() -> list[tuple[str, str]]:
    """Words that are split, contractions, words with an apostrophe of their own, words and compounds."""
    a, slashed = _APOSTROPHE, r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    return [
        *((f"(?i:{first})", f"(?i:{second})") for first, second in _SPLIT_WORDS),
        ("'[tT]", "(?i:is|was)"),
        ("(?i:more)", f"(?i:{a}n)"),
        (f"(?i:cont{a}d\\.)", ""),
        (_WORD, f"{_ENDING}[^A-Za-z]"),
        (r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", f"[nN]{_QUOTE}[tT]"),
        (f"[A-HJ-XZn]{_QUOTE}{_LETTER}{{2,}}", ""),
        (f"[nN]{_QUOTE}[tT]", "[^A-Za-z]"),
        (_ENDING, "[^A-Za-z]"),
        (f"[yY]{a}", _LETTER),
        (f"(?i:{a}n{a}?|[ldj]{a}|{a}[2-9]0s|{a}(?:till?|em|cause)|(?:ol|dunkin|somethin){a})", ""),
        (
            f"(?i:d{a}ye|nor{a}easter|c{a}mon|c{a}est|cap{a}n|ev{a}ry|li{a}l|nat{a}l|o{a}clock|e{a}er|s{a}mores|o{a}o)",
            "",
        ),
        (f"{_LETTER}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_LETTER}*", ""),
        (f"{a}\\d\\d", r"\s"),
        ("[`'\u2018]", r"[A-Za-z][^ \t\n\r\u00a0]"),
        (_ENDING, ""),
        (_WORD, ""),
        # Behind words, before compounds: "Inc.ab" is one word, "Inc.-x" is not one compound.
        (f"(?:(?i:{_any_of(_LOOSE_ABBREVIATIONS)})|{_any_of(_LOOSE_CAPITALISED)}|[Pp]?[Pp]t[ye]s?)\\.", r"[\s\S]{2}"),
        (_COMPOUND, ""),
        (_CHAIN, ""),
        (_INITIALS, ""),
        (f"(?:{_CHAIN}|{_COMPOUND}|{_WORD}|{_INITIALS})\\.", "[,;:]"),
        (rf"{slashed}(?:\\?/{slashed}){{1,2}}", ""),
        (r"(?i:pro-|anti-)|C\.D\.s|S(?:&|&amp;)(?:P-500|Ls)|(?i:-[LR][RCS]B-)|[CcFf]#|[Cc]\+\+", ""),
    ]


def _abbreviation_rules() -> list[tuple[str, str]]:
    starts = "|".join(f"{re.escape(word[0])}(?i:{re.escape(word[1:])})" for word in _SENTENCE_STARTS.split())
    return [
        (f"(?:(?i:{_any_of(_ABBREVIATIONS)})|[Mm]fg|[Mm]tg)\\.", ""),
        (f"(?i:{_any_of(_NUMBER_ABBREVIATIONS)})\\.", r" ?\d"),
        ("[A-Za-z]", rf"\.\s+(?:(?:{starts})\s|{_TAG})"),
        (r"[A-Za-z]\.", ""),
        (rf"{_ACRONYM}\.?", ""),
    ]


def _number_rules() -> list[tuple[str, str]]:
    """Dates, numbers, fractions, powers, telephone numbers, currencies."""
    gap, optional_gap = "[- \u00a0]", "[- \u00a0]?"
    area = rf"(?:\([0-9]{{2,3}}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{{2,4}}{gap})?[0-9]{{2,4}}{gap})"
    return [
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", ""),
        (f"[-+]?{_NUMBER}", ""),
        (rf"(?:\d{{1,4}}{gap})?\d{{1,4}}(?:\\?/|\u2044)\d{{1,4}}", ""),
        (r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)", ""),
        (f"{area}[0-9]{{3,4}}{optional_gap}[0-9]{{3,5}}", ""),
        (r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}", ""),
        (r"[A-Z]*\$", ""),
        (r"[\u0080\u00a2-\u00a4\u20a0\u20ac\u00bc-\u00be\u2153\u2154]", ""),
    ]


def _web_rules() -> list[tuple[str, str]]:
    """Web addresses, mail, file names (behind acronyms: "D.C." is no C file), markup."""
    end = r"""[^ \t\n\f\r"<>|.!?(){},-]"""
    path = rf"""(?:/[^ \t\n\f\r"<>|()]+{end})?"""
    mail_char = r"""[^ \t\n\f\r"<>|()\u00a0{}]"""
    host_char = r"""[^ \t\n\f\r"<>|().\u00a0{}]"""
    return [
        (rf"""(?i:https?)://[^ \t\n\f\r"<>|(){{}}]+{end}""", ""),
        (rf"""(?:[^ \t\n\f\r"`'<>|.!?(){{}}$,-_]+\.)+(?:com|net|org|edu){path}""", ""),
        (rf"""www\.(?:[^ \t\n\f\r"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{path}""", ""),
        (rf"(?:<|&lt;)?[a-zA-Z0-9]{mail_char}*@(?:{host_char}+\.)*{host_char}+(?:>|&gt;)?", ""),
        (f"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER}+", ""),
        (f"{_ALNUM}+(?:\\.{_ALNUM}+)*\\.(?i:{_any_of(_FILE_ENDINGS)})", r"[\s!,.?]"),
        (_TAG, ""),
        ("&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+|amp|lt|gt|nbsp|quot|apos|MD|mdash|ndash);", ""),
    ]


def _punctuation_rules() -> list[tuple[str, str]]:
    """Faces, and runs of the same punctuation."""
    return [
        (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]"),
        (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|<<|>>", ""),
        (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|\u2026", ""),
        (r"[?!]+|-+|_+|@+|#+|\*+|(?:\\\*){1,3}|''|``|['\"]", ""),
        (r"[`\u0091-\u0094\u2018-\u201f\u2039\u203a\u00ab\u00bb]{1,2}|[\u0096\u0097\u2013-\u2015\u00a3]", ""),
        (f"[{_SYMBOLS}]", ""),
    ]


def build_rules() -> list[re.Pattern[str]]:
    """Return the compiled rules in their order. Group 1 is the token; the rest of a match is its context."""
    rules = _word_rules() + _abbreviation_rules() + _number_rules() + _web_rules() + _punctuation_rules()
    return [re.compile(f"({token}){context}") for token, context in rules]


SPLIT_WORDS = frozenset(first + second for first, second in _SPLIT_WORDS)
