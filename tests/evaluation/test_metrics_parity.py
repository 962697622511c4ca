"""Caption metrics against pycocoevalcap, and the tokenizer against its Java original."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from frozenprefix.evaluation.metrics import CaptionReferences, caption_metrics, ptb_tokenize
from tests.evaluation.test_metrics import TOKENS

pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap")
pytestmark = pytest.mark.parity
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs java for the original tokenizer")

# Each line holds chunks that once were, or could well be, cut differently.
TRICKY = r"""
can't won't doesn't n't could've he'd've y'all 'tis 'Twas more'n d'ye ain't shan't DON'T don’t it’S n`t
gonna gotta wanna lemme gimme cannot cannots Cannot's can not
o'clock rock'n'roll rock 'n' roll 'em 'til 'cause '90s 90's the '60s '95 ' 95 O'Neil ma'am l'eau jack-o'-lantern
dogs' dog's James's ' s one's 's s' #1's A's x's and o's t-shirt's T.V.'s 5's $5's %'s AT&T's a/b's
U.S. u.s. U.S.A. Ph.D. J.R.R. Tolkien D.C. S.C.U.B.A. a.k.a. e.g. i.e. U.S.-based pre-U.S. non-U.S. a.b.c
Mr. Mrs. Dr. St. Jr. Inc. etc. Ave. vs. Sept. wed. no. no. 8 fig. 2 ca. 1900 ill. Ill. Inc.-x Inc.ab St.-x wed.a
by J. Smith by J. The dog by J. Mr. X by J. <b> P. "P." A. b. c
10:30 10:30. 5pm 5,000 1,000.50 .5 -5 +5 5. 5., dogs., 5.a a.5 3D 2nd 1080p 10a.m. 5.5k 4x4 5'10" 5-6 5:6
1/2 3 1/2 1-1/2 10/12/2010 2010-10-12 05-05-05 and/or w/ w/o he/she a/b/c/d 100/200/300 ½ 3½ ⅓ ⅛
555-1234 (555) 555-1234 555.555.1234 1-800-555-1234 555 1234 12 34
#1 # 7 #tag #a_b @user @ user@ a@b.c foo@bar.com. <foo@bar.com>
$5 US$5 5$ £5 €5 5¢ ¥100 50% 20°C H₂O x² №5 ™ ® ©
t-shirt -foo foo- foo--bar -- --- ---- ----- a–b a—b 1990–1995 − ‑ ‐ black-and-white 5-year-old A-10. a.b-c a-b/c
http://a.com/b?c=1. www.a.com a.com foo.html 10.jpg ftp://x.y https://a.b.c/d-e_f,g statefarm.com.
at&t AT&T b&b R&B Q&A & &amp; &lt; &gt; &quot; &nbsp; S&P A&amp;B a+b A+B C++ c# F#
(red) [blue] {green} (5) (a) b) dog(s) -LRB- <tag> <b>x</b> <a href="x y"> a<b <3 << >>
:) :-( ;) =D :Da :3 ^_^ >_< (^_^) -_- o.O :/ 8) XD
"q" “q” ‘q’ «q» ``q'' 'q q' "'q'" “‘q’” ’’ ““ `q` ´q´ ′q″
... .. .... . . . … !!! ?! ?!! hello!world hello.World hello,world hello;world a..b a...b yes.no
a*b ** \* a\b a|b ~ ^ a_b __ _a_ a = b => <- % \/
café naïve Zürich Ærø 日本語 привет-мир é's l'été d'é
emoji 😀 dog 🐶s ❤️ zero​width soft­hyphen nb space
""".strip("\n").split("\n")
# Not worth a rule: entities inside words, repeated special words.
KNOWN_DIFFERENCES = ["caf&eacute;", "li'lli'l", "cannot'lldog"]


def java_tokens(texts):
    """What pycocoevalcap's tokenizer makes of each text; a neutral caption stands between them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {i: [{"caption": text}, {"caption": "x"}] for i, text in enumerate(texts)}
    tokens = PTBTokenizer().tokenize(captions)
    return [tokens[i][0] for i in captions]


def our_tokens(texts):
    return [" ".join(ptb_tokenize(text)) for text in texts]


def flickr8k(split=None):
    root = os.environ.get("FROZENPREFIX_DATA")
    if not root:
        pytest.skip("FROZENPREFIX_DATA is not set")
    lines = (Path(root) / "flickr8k" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if split in (None, row["split"])]


def assert_same_scores(predictions, references, theirs_predictions, theirs_references):
    """Compare with pycocoevalcap, which gets tokenised text, for the corpus and for each image."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ours = caption_metrics(predictions, references)
    bleus, each_bleu = Bleu(4).compute_score(theirs_references, theirs_predictions, verbose=0)
    rouge, each_rouge = Rouge().compute_score(theirs_references, theirs_predictions)
    cider, each_cider = Cider().compute_score(theirs_references, theirs_predictions)
    theirs = {f"bleu_{n + 1}": score for n, score in enumerate(bleus)} | {"rouge_l": rouge, "cider_d": cider}
    assert {name: ours.corpus[name] for name in theirs} == pytest.approx(theirs, abs=1e-10)
    for i, key in enumerate(theirs_references):
        each = {f"bleu_{n + 1}": each_bleu[n][i] for n in range(4)} | {
            "rouge_l": each_rouge[i],
            "cider_d": each_cider[i],
        }
        assert ours.per_image[key] == pytest.approx(each, abs=1e-10)


def noisy_predictions(references, seed):
    """For each id: nothing, one to three words, a reference, a piece of one, or a long jumble."""
    rng = random.Random(seed)
    words = " ".join(text for texts in references.values() for text in texts).split()
    predictions = {}
    for key, texts in references.items():
        text = rng.choice(texts)
        jumble = " ".join(rng.choices(words, k=rng.choice([1, 2, 3, 30])))
        predictions[key] = rng.choice(["", jumble, text, " ".join(text.split()[:4])])
    return predictions


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_pretokenised_text_equal_pycocoevalcap(seed):
    rng = random.Random(seed)
    words = ["a", "the", "dog", "cat", "man", "runs", "sits", "on", "in", "red", "grass", "3\u00a01/2"]
    references = {
        str(i): [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 5))]
        for i in range(60)
    }
    references["0"] = ["a dog", "", "."]
    predictions = noisy_predictions(references, seed)
    theirs = {key: [" ".join(ptb_tokenize(text)) for text in texts] for key, texts in references.items()}
    assert_same_scores(
        predictions, references, {key: [" ".join(ptb_tokenize(text))] for key, text in predictions.items()}, theirs
    )


@needs_java
def test_tokens_of_tricky_text_equal_the_java_tokenizer():
    texts = [*TOKENS, *TRICKY, *(chunk for line in TRICKY for chunk in line.split(" "))]
    assert dict(zip(texts, our_tokens(texts), strict=True)) == dict(zip(texts, java_tokens(texts), strict=True))


@needs_java
def test_known_differences_are_still_differences():
    ours, theirs = our_tokens(KNOWN_DIFFERENCES), java_tokens(KNOWN_DIFFERENCES)
    assert all(a != b for a, b in zip(ours, theirs, strict=True))


@needs_java
def test_tokens_of_random_text_nearly_always_equal_the_java_tokenizer():
    rng = random.Random(0)
    letters = "aeinotsdmB15" * 2 + "'.-,:!?&/ " + '’“…–é$#@()*_+=<>"`'
    chunks = [chunk for line in TRICKY for chunk in line.split(" ")]
    texts = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(3000)]
    texts += [" ".join(rng.choices(chunks, k=5)) for _ in range(3000)]
    different = [t for t, a, b in zip(texts, our_tokens(texts), java_tokens(texts), strict=True) if a != b]
    assert len(different) <= 6, different


@needs_java
def test_tokens_of_all_flickr8k_captions_equal_the_java_tokenizer():
    texts = [text for row in flickr8k() for text in row["captions"]]
    different = [(t, a, b) for t, a, b in zip(texts, our_tokens(texts), java_tokens(texts), strict=True) if a != b]
    assert len(texts) > 1000
    assert different == []


@needs_java
def test_scores_of_flickr8k_validation_equal_pycocoevalcap():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rows = flickr8k("val")
    references = {row["image"]: row["captions"][1:] for row in rows}
    human = {row["image"]: row["captions"][0] for row in rows}
    shuffled = dict(zip(human, [*list(human.values())[1:], rows[0]["captions"][0]], strict=True))
    same = dict.fromkeys(human, "A dog runs.")
    tokenize = PTBTokenizer().tokenize
    theirs = tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    shared = CaptionReferences(references)
    for predictions in (human, shuffled, same, noisy_predictions(references, 0)):
        theirs_predictions = tokenize({key: [{"caption": text}] for key, text in predictions.items()})
        assert_same_scores(predictions, shared, theirs_predictions, theirs)
