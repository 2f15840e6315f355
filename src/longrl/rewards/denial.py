"""Words by which a response denies, doubts or takes back what it says. What it then names is not its answer.

No list of words is whole. What must hold whatever is said: a response never earns the reward for more than one truth.
"""

from __future__ import annotations

import re

DOUBT = (
    r"\b(?:maybe|perhaps|possibl[ey]|probabl[ey]|presumably|apparently|likely|unsure|uncertain|unclear|guess\w*"
    r"|tentativ\w*|preliminary|provisional\w*|50/50"
    r"|(?:not|n't) (?:\w+ )?(?:sure|certain|confident|clear)|(?:don'?t|do not) know"
    r"|can(?:no|')?t (?:tell|determine|say|decide|be)|(?:might|could|may) (?:\w+ )?be"
    r"|either|alternatively|depends|torn|(?:first|initial) (?:thought|idea|impression|answer))\b"
)
SET_ASIDE = (
    r"\b(?:rul(?:e|ed|es|ing) out|exclud\w*|reject\w*|discard\w*|dismiss\w*|eliminat\w*|cross(?:ed)? out"
    r"|anything but|far from|rather than|instead of|wide of|nowhere near)\b"
)
TAKEN_BACK = (
    r"\b(?:wait|hold on|hang on|nope|sorry|oops|hmm+|(?:scratch|strike|forget|ignore|disregard|undo) (?:that|it|this)"
    r"|never ?mind|t(?:ake|ook) (?:that|it|this) back|withdraw\w*|retract\w*|second thoughts?|on reflection|my bad"
    r"|correction|kidding|i mean|mistake\w*|reconsider\w*|chang(?:e|ed|ing) my|on the other hand|unless|otherwise)\b"
    r"|\bno[,!]|[.!] no\b|\bactually,? (?:no|not|it|the|that)\b"
    r"|\b(?:opposite|joke|lie|lying|pretend\w*)\b"
)
_WRONG = r"(?:wrong|incorrect|false|untrue|mistaken|impossible|absurd|nonsense|invalid|inaccurate|rubbish)"
_DENIED = re.compile(
    rf"{DOUBT}|{SET_ASIDE}|\b(?:never|neither|nor|cannot|hardly|scarcely|doubt\w*|disagree\w*|den(?:y|ies|ied))\b"
    rf"|\b(?:is|are|was|were|be|it's|that's|seems?|looks?|sounds?)\s+(?:\w+\s+){{0,2}}{_WRONG}\b"
    rf"|\b{_WRONG}\s*(?:(?:answer|result|value|number|guess)s?\s*)?(?:is|was|:|=)"
    rf"|^\W*{_WRONG}\b|\b{_WRONG}\W*$|[(,:\u2013\u2014-]\s*{_WRONG}\b",
    re.I,
)
_TAKEN_BACK = re.compile(TAKEN_BACK, re.I)


def is_denied(text: str) -> bool:
    """Whether a text denies, doubts or sets aside something, wherever it does."""
    return bool(_DENIED.search(text))


def is_taken_back(after: str) -> bool:
    """Whether what comes after an answer takes it back."""
    return bool(_TAKEN_BACK.search(after))
