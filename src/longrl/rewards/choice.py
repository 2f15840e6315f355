"""Which option a response settles on: one letter, or none where it names several, hedges or takes it back.

What counts is what was said, not what may have been meant: a response that a careful reader could take in two ways
earns nothing. So every rule below needs one letter in a place where answers stand, and refuses at the first sign of
another letter, of doubt or of a change of mind after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_uppercase

from longrl.rewards.answer import after_answer, final_answer, normalise, parse_letter, plain
from longrl.rewards.denial import DOUBT, SET_ASIDE, TAKEN_BACK
from longrl.types import Example, Rollout

_STRUCK = re.compile(
    r"~~|[\u00ac\u2260\u2717\u2718\u274c\u00d7\u0336]|!=|\\(?:[bx]?cancel|sout|st)\b|<s>[^<]*</s>", re.I
)

_BARE = r"\b(?P<bare>[A-Za-z])(?![\w']|[-\u2013\u2014/&+|]\w|\.[A-Za-z]\b)"
_IN = r"\(\s*(?P<in>[A-Za-z])\s*\)"
# After the bare letter of an answer does not come just any word: "A dog" and "C major" name no option.
_NEXT = r"(?=\s*(?:$|[).:,;!?|({}\u2013\u2014\u2705\u2714\n]|-\s|(?:because|since|as|given|which|based|for sure)\b))"
_LETTER = rf"(?:{_IN}|{_BARE}{_NEXT})"
_SURELY = r"(?:clearly|obviously|definitely|certainly|indeed|simply|therefore|thus|hence|undoubtedly)"
_IS = (
    rf"(?:\s+(?:is|was|be|would be|should be|must be|has to be|here|to (?:the|this) question|letter|option"
    rf"|choice|answer|{_SURELY})"
    r"|\s*[:=]|\s+-)"
)
_CUE = r"(?:\b(?:the|my|our|final|correct|best|right|most \w+)\s+){0,6}"
_STATED = re.compile(
    rf"{_CUE}(?:\b(?:answer|ans\.?){_IS}{{0,5}}|\b(?:option|choice|selection|letter|pick|verdict|response){_IS}{{1,5}}"
    rf"|\b(?:choose|pick|select|answer|(?:go|going) (?:with|for)|settle on|opt for)"
    r"(?:\s+(?:option|choice|answer|letter))?"
    r"|\b(?:so|thus|therefore|hence|conclusion)[,:]?"
    r"|\b(?:is|matches|corresponds to|supports)\s+(?:option|choice|answer))"
    rf"\s*{_LETTER}",
    re.I,
)
_CORRECT = re.compile(
    rf"(?:\b(?:option|choice|answer|only)\s+){{0,2}}(?:{_IN}|{_BARE})\s*(?:is|'s|would be|must be|has to be)\s+"
    rf"(?:(?:the|most|only|best|{_SURELY})\s+){{0,3}}(?:correct|right|accurate|true|best|appropriate|answer|one)"
    r"(?=\s*(?:$|[.,;!?)\n]|(?:answer|choice|option|one|because|since|as|here)\b))",
    re.I,
)
_LEAD = (
    r"[\s.,;:\u2022\u2192\u2705\u2714>-]*(?:(?:so|thus|therefore|hence|ok|okay|sure|yes|well|finally|overall|final|my|the"
    r"|answer|option|choice|letter|selection|response|correct|best|right|is|would be|must be|has to be|it|it's"
    r"|that|that's|this|conclusion|i(?: am|'m) (?:sure|certain|confident)(?: that)?"
    rf"|i(?:'d| would)? (?:choose|pick|select|say|answer|go with|think|believe)|{_SURELY})\b[\s:,=-]*){{0,12}}"
)
_HEAD = re.compile(rf"(?P<lead>{_LEAD}){_LETTER}", re.I)
_OPENING = re.compile(r"[.\n]|,\s*(?:so|therefore|thus|hence)\b", re.I)
# What leads up to an option's text.
_TEXT_LEAD = re.compile(
    r"^(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|my|final|correct|best|right)\s+){0,3}answer(?:\s+is)?\s*[:=]?\s*",
    re.I,
)
_MORE = re.compile(r"\s*,?\s*(?:and|or|nor|plus|as well as|[/&])\s+", re.I)
_IN_BRACKETS_LAST = re.compile(r"\((?P<in>[A-Z])\)\s*[.!]*$")

_AND = r"(?:\s*,?\s*(?:and|or|nor)\s+|\s*,\s*|\s*/\s*)"
_LIST = rf"(?:\(?\b[A-HJ-Z]\b\)?{_AND}){{0,25}}\(?\b[A-HJ-Z]\b\)?"
_WHOLE = r"(?:\([A-HJ-Z]\)|\b[A-HJ-Z]\b)"  # for "(not A) or C", where the list ends at A
# Options that are set aside: "A, C and D are not shown", "B rather than C", "(not D)".
_ELIMINATED = re.compile(
    rf"(?:\b(?:options?|choices?|answers?)\s+)?(?P<subject>{_LIST})\s+(?:(?:is|are|was|were|do|does|did|can)(?:\s+not\b|n't\b"
    r"|not\b)(?!\s+(?:wrong|incorrect|false|only))|(?:is|are)\s+(?:(?:all|clearly|both|obviously)\s+)?"
    r"(?:wrong|incorrect|false|eliminated|ruled out|unsupported|irrelevant)\b)"
    rf"|(?<=[\s,(])(?:and\s+)?(?:not|rather than|instead of)\s+(?:options?\s+)?"
    rf"(?P<object>(?:{_WHOLE}{_AND}){{0,25}}{_WHOLE})(?=\s*[.,;)!]|\s*$)"
)
# Options that are merely talked about, before the answer.
_DISCUSSED = re.compile(
    rf"(?:\b(?:[Oo]ptions?|[Cc]hoices?)\s+)?{_LIST}\s+(?:show|depict|describe|mention|say|state|claim|suggest|imply|implie|refer"
    r"|involve|happen|occur|appear|come)s?\b"
)
# All options written down again, each on its line.
_LISTING = re.compile(r"^\(?A[.):] .*\n\(?B[.):] .*(?:\n\(?[C-Z][.):] .*)*", re.M)
_MENTIONED = re.compile(
    r"\(\s*([A-Za-z])\s*\)|(?<![\w'.-])([A-Za-z])(?=[).:](?!\w))|(?<![\w'.-])([B-HJ-Zb-h])(?![\w'-]|\.\w\b)"
    r"|(?<![\w'.-])(A)(?![\w'-])(?!\s+[a-z])"
    r"|(?<![\w'.-])(A)(?=\s+(?:is|was|seems|looks|could|might|may|would|can|or|and|also|too|as|fits|matches|instead|if)\b)"
    r"|\b(?:or|and|nor)\s+(a)(?=\s*(?:$|[.,;:)?!]))|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer)\s+([A-Za-z])(?![\w'])"
    r"|(?<!\w)(a)(?=\s*(?:[/&|;,]|(?:or|and)\s+\(?[B-Zb-h]\b|[.!)]*\s*$))"
    r"|^\W*(a)(?=\s+(?:or\b|and\b|[A-Z]))"
)
_DOUBT = rf"{DOUBT}|\b(?:random\w*|confidence|least|worst|equally|tie[ds]?)\b"
_AFTER = re.compile(
    rf"\?|{_DOUBT}|{TAKEN_BACK}|\b(?:both|same for|all of them|any of)\b|\bno,"
    r"|\b(?:it|this|that|which|answer)(?: is|'s| was) (?:wrong|incorrect|false|not)\b"
    r"|\b(?:is|was)(?:n't| not) (?:right|correct|true|the answer)\b"
    r"|\b(?:assuming|supposing|provided that|whatever|among others|etc|said (?:no one|nobody))\b",
    re.I,
)
_AFTER_AT_ONCE = re.compile(
    rf"{SET_ASIDE}"
    r"|(?:or|and|nor|vs|versus|plus|if|no(?! one)|not|wrong|incorrect|false|never|neither|none(?! of)|is|isn't"
    r"|was|wasn't|can't|cannot|but|minus|except|through|to|x|true)\b",
    re.I,
)
_BEFORE = re.compile(
    rf"\?|{_DOUBT}|\b(?:if|might|may|could|whether|suppose|assum\w+|unless"
    r"|(?:first|second|next|other|another|previous|initial|alternative|trap|naive|obvious|expected|reference)"
    r"(?: (?:answer|choice|option|guess|pick|selection|response)|(?=\s*$))|at first|initially|others"
    r"|suspect|it (?:seems|appears)|looks like|tempting|told|many|do you|why|everyone|some|someone|people"
    r"|he|she|they|his|her|their|your|user|example|format)\b",
    re.I,
)
_NEGATED = re.compile(
    rf"{SET_ASIDE}|\b(?:not|never|no|neither|nor|wrong|incorrect|false|hardly|cannot|except|but|avoid|refuse|mistake\w*"
    r"|error|foolish|absurd|silly|disagree\w*|den(?:y|ies)|doubt\w*|\w+n't)\b",
    re.I,
)
# A statement that is somebody else's: "The sign says: ...", "the teacher's answer is".
_REPORTED = re.compile(
    r"\b(?:says|said|reads|claims|claimed|states|stated|writes|wrote|thinks|believes|insists)\s*[:,]?\s*(?:that\s*)?$"
    r"|\b(?:blackboard|whiteboard|board|sign|caption|subtitles?|screen|narrator|teacher|speaker)\s*:\s*$"
    r"|(?<!\bit)(?<!\bthat)(?<!\bhere)(?<!\bwhat)(?<!\blet)'s\s*$",
    re.I,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_BY_ORDINAL = re.compile(rf"\b({'|'.join(_ORDINALS)}|last|former|latter|other)\s+(?:one|option|choice)\b", re.I)
_OPTION = re.compile(r"^\s*\(?([A-Z])[).:]\s*(\S.*?)\s*$", re.M)


def choice_reward(example: Example, rollout: Rollout) -> float | None:
    """1.0 if the response settles on the true option (`choose`), else 0.0; None if the example has no truth.

    Raises:
        ValueError: The truth is not an option letter.
    """
    truth = letter_of(example)
    if truth is None:
        return None
    said, options = final_answer(rollout), options_of(example)
    if said is None or choose(said, options) != truth:
        return 0.0
    after = plain(after_answer(rollout))
    return 0.0 if _others(after, truth, options) or _AFTER.search(after) else 1.0


def letter_of(example: Example) -> str | None:
    """The truth of a choice question; None if it has none.

    Raises:
        ValueError: It is not an option letter.
    """
    if example.answer is None:
        return None
    letter = parse_letter(example.answer)
    if letter is None:
        raise ValueError(
            f"example {example.id}: the truth of a choice question must be an option letter, got {example.answer!r}"
        )
    return letter


def options_of(example: Example) -> dict[str, str]:
    """Letter -> text, from the lines "A. text" of the last message; {} if they are not A, B, ... in order."""
    text = "".join(part for part in example.messages[-1].content if isinstance(part, str)) if example.messages else ""
    found = _OPTION.findall(text)
    letters = "".join(letter for letter, _ in found)
    return dict(found) if len(found) > 1 and ascii_uppercase.startswith(letters) else {}


def choose(text: str, options: Mapping[str, str] | None = None) -> str | None:
    """The one option letter that an answer settles on, in upper case; None if there is none, or more than one.

    "B", "(b)", "B. text", "Option B", "The answer is **B**.", "\\boxed{B}", "A is wrong. The answer is B." settle on B.
    "A or B", "B? C?", "B. Wait, C", "probably B", "not B", "A dog" settle on nothing.

    Args:
        text: What `final_answer` gave.
        options: letter -> text, where known: then an answer may be an option's text alone, a letter beside another
            option's text is a contradiction, and letters that are no option are just letters.
    """
    options, core = options or {}, plain(text)
    if _STRUCK.search(text) or _STRUCK.search(core):
        return None
    headed = _HEAD.match(core)
    by_text = [letter for letter, option in options.items() if not headed and _says(core, option)]
    core = _LISTING.sub("", core)
    eliminated = {letter for match in _ELIMINATED.finditer(core) for letter in _letters(match)}
    letter = _settled(_ELIMINATED.sub(" ", core), options)
    if by_text:
        return by_text[0] if len(by_text) == 1 and letter in (None, by_text[0]) else None
    if letter is None or letter in eliminated or (options and letter not in options):
        return None
    opening = _OPENING.split(core, maxsplit=1)[0]
    if any(_says(opening, option) for other, option in options.items() if other != letter):
        return None  # "Yes. The answer is B.", where A is Yes
    # "A", where the text of another option is "A"
    lettered = any(_words(text) == [letter.casefold()] for other, text in options.items() if other != letter)
    return None if lettered and not _match_words(options[letter], core.partition(" ")[2]) else letter


def _says(core: str, option: str) -> bool:
    """Whether an answer is an option's text, without letters and marks that the text does not have."""
    said = _TEXT_LEAD.sub("", core)
    added = _mentioned(said) - _mentioned(plain(option)) or any(mark in said and mark not in option for mark in "?%+")
    return normalise(option) == normalise(said) != () and not added


def _settled(core: str, options: Mapping[str, str]) -> str | None:
    head = _HEAD.match(core)
    stated = [*_STATED.finditer(core), *_CORRECT.finditer(core)]
    if len(stated) > 20:  # not an answer, and to look at each would take long
        return None
    if stated:
        last = max(stated, key=lambda match: match.end())
        named = {_letter(match) for match in (*stated, *([head] if head else []))}
        clear = not _others(_DISCUSSED.sub("", core[: last.start()]), _letter(last), options)
        sure = clear and len(named) == 1 and all(_is_asserted(core[: match.start()]) for match in stated)
        return _letter(last) if sure and _ends(core[last.end() :], _letter(last), options) else None
    if head:
        if head["lead"].strip() and _is_other_option(core, _letter(head), options):  # "Yes, B", where A is Yes
            return None
        return _letter(head) if _ends(core[head.end() :], _letter(head), options) else None
    before, _, line = core.rpartition("\n")
    last = _HEAD.match(line) or _IN_BRACKETS_LAST.search(core)
    if last is None:
        return None
    if last.re is _IN_BRACKETS_LAST:
        before, line = core[: last.start()], ""
        if _NEGATED.search(before) or _is_other_option(before, _letter(last), options):
            return None
    alone = not _others(before, _letter(last), options) and not _AFTER.search(before)
    return _letter(last) if alone and _ends(line[last.end() :] if line else "", _letter(last), options) else None


def _is_asserted(before: str) -> bool:
    """Whether what leads up to a statement leaves it standing: no doubt or condition, no negation of it."""
    sentence = re.split(r"[.!\n;](?:\s|$)", before)[-1]
    clause = re.split(r",\s*$|\b(?:so|therefore|thus|hence|then|means)\b", sentence)
    return not (_BEFORE.search(sentence) or _NEGATED.search(clause[-1]) or _REPORTED.search(sentence))


def _ends(tail: str, letter: str, options: Mapping[str, str]) -> bool:
    """Whether nothing after an answer's letter puts it in doubt."""
    if re.match(r"\s*\(\s*\d[\d.]*\s*%", tail):  # "B (60%)"
        return False
    tail = re.sub(r"^[\s).:,;!|({}\u2013\u2014-]+(?:(?:that is|i\.e\.|namely|meaning)[,:]?\s+)?", "", tail)
    own = _match_words(options.get(letter, ""), tail)
    if _is_other_option(tail, letter, options) or (not own and _AFTER_AT_ONCE.match(tail)):
        return False
    tail = tail[own.end() :] if own else tail
    if own and (more := _MORE.match(tail)) and _is_other_option(tail[more.end() :], letter, options):
        return False
    return not (_others(tail, letter, options) or _AFTER.search(tail) or _is_another(tail, letter, options))


def _others(text: str, letter: str, options: Mapping[str, str]) -> bool:
    """Whether `text` mentions another option."""
    found = _mentioned(text)
    return bool(found & set(options) - {letter} if options else found - {letter})


def _is_another(text: str, letter: str, options: Mapping[str, str]) -> bool:
    """Whether `text` calls the answer by another place among the options: "B. It is the last one."."""
    places = dict(zip(_ORDINALS, ascii_uppercase, strict=False)) | {"last": max(options, default="")}
    return any(places.get(word.casefold()) != letter for word in _BY_ORDINAL.findall(text))


def _mentioned(text: str) -> set[str]:
    """Letters that may name options, in upper case."""
    return {next(filter(None, match.groups())).upper() for match in _MENTIONED.finditer(text)}


def _is_other_option(text: str, letter: str, options: Mapping[str, str]) -> bool:
    """Whether `text` begins with the text of another option, as in "B. red" where red is C; the longest text counts."""
    found = {other: match.end() for other, option in options.items() if (match := _match_words(option, text))}
    end = max(found.values(), default=0)
    return bool(found) and found.get(letter) != end and bool(re.match(r"\W*$|\s*[.,;)\n]", text[end:]))


def _match_words(option: str, text: str) -> re.Match[str] | None:
    words = _words(option)
    return re.match(r"\s*" + r"\W+".join(map(re.escape, words)) + r"\b", text, re.I) if words else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", plain(text).casefold())


def _letter(match: re.Match[str]) -> str:
    groups = match.groupdict()
    return (groups.get("in") or groups["bare"]).upper()


def _letters(match: re.Match[str]) -> list[str]:
    return re.findall(r"\b[A-Z]\b", match["subject"] or match["object"])
