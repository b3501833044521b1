import math
import operator as op
import random
import re
from collections import Counter
from fractions import Fraction
from itertools import accumulate

# ==== Labels: r(o | q) of Algorithm 1, a checker that is a table of rewrite rules =================
# Gold and reply are rewritten by SYMBOLS and RULES, split into their structure (list, set, tuple,
# matrix, ...) and evaluated in exact fractions; equal forms are equal answers. A name (π, x, apple)
# is a random fraction, a root its first 400 digits; what does not parse is text. No algebra.
MAX_RESPONSE, MAX_ANSWER, MAX_DEPTH, MAX_BITS = 100_000, 600, 30, 20_000  # these bound the work
SYMBOLS = dict(re.findall(r"(\S+)→(\S*)", r"""−→- –→- ×→* ·→* \times→* \cdot→* **→^ sqrt→√ \sqrt→√
    pi→π \pi→π infty→∞ \infty→∞ \pm→± \cup→∪ \bigcup→∪ <=→≤ \le→≤ \leq→≤ \leqslant→≤ >=→≥ \ge→≥
    \geq→≥ \geqslant→≥ \neq→\ne \approx→= \in→= and→, or→, &→, \\→),( \{→{ \}→} \dfrac→\frac @→?
    \tfrac→\frac ⁻→- ⁰→0 ¹→1 ²→2 ³→3 ⁴→4 ⁵→5 ⁶→6 ⁷→7 ⁸→8 ⁹→9 \circ→° \dollar→@dollar %→@percent
    \%→@percent percent→@percent $→~ \$→~ \(→~ \)→~ \left→~ \right→~ \displaystyle→~ \quad→~"""))
TEXT = r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|normal)|[mhf]box|boxed|operatorname) ?"
UNIT = (r"(?:(?:square|sq|cubic) )?(?:[cdkm]m|[km]g|ft|in|lb|mph|inch|foot|feet|people|unit|yard"
        r"|mile|pound|ounce|dollar|cent|degree|radian|sec|second|min|minute|hr|hour|day|week|month"
        r"|year|way|point|student|(?:centi|milli|kilo)?(?:meter|metre|liter|gram))")
RULES = [(re.compile(pattern), new) for pattern, new in [  # in this order
    (r"(\\left ?[([] *)?\\begin\{([pb]matrix|array\}\{[clr|]+)\}", "[("),  # \begin{pmatrix}1 -> [(1
    (r"(\\\\\s*)?\\end\{([pb]matrix|array)\}( *\\right ?[)\]])?", ")]"),  # 4\end{pmatrix} -> 4)]
    (r"(?<=\d)(?<!\d{4})(,?\\!|\\[ ,]|\{,\}|[ ~])\s*(?=\d{3}(?![\d/]))", ""),  # 10,\!080 -> 10080
    (r"(?<![\d,.])\d{1,3}(,\d{3})+(?![\d,])(?!.*((?<!\\)[)\]]|\\\}))",  # 1,234 -> 1234
     lambda m: m[0].replace(",", "")),
    (r"\\\$ ?([\d,.]*\d)", r"\1\\dollar"),  # \$5 -> 5\dollar
    ("[⁻⁰¹²³⁴-⁹]+", r"^{\g<0>}"),  # 10⁻³ -> 10^{⁻³}
    (r"\*\*|[<>]=|\\?([A-Za-z]+|[^\d ])", lambda m: SYMBOLS.get(m[0], m[0])),  # 2\pi -> 2π
    (TEXT + r"\{[ ~]*([mgshLNJWVAKC](/[a-z]+)?)[ ~]*\}", r"@\1"),  # 5\text{ m} -> 5@m
    (TEXT + r"(\{([^{}]*)\})?", r" \2 "),  # \text{(C)} ->  (C)
    (r"(\\[!,;:> ]|~|\s)+", " "),  # 1,\,2 -> 1, 2
    (rf"(?<=[\d.)}}π]) ?({UNIT})(e?s)?( ?(/|per)? ?({UNIT}|[mhs]))?\b", r"@\1\3"),  # 5 cm -> 5@cm
    (r"(\^ ?)?\{? ?° ?\}?", "@degree"),  # 36^{°} -> 36@degree
    (r"(?<=\d) ?x ?(?=10 ?\^)", "*"),  # 4.5 x 10^33 -> 4.5*10^33
    (r"\\frac ?(\d|{[^{}]*}) ?(\d|{[^{}]*})", r"\\frac{\1}{\2}"),  # \frac12 -> \frac{1}{2}
    (r"(?<=\d) ?\\frac{+(\d+)}+{+(\d+)}+", r" \1/\2"),  # 2\frac{1}{2} -> 2 1/2
    (r"(?<![\w.}/*^])(\d+) (\d+/\d+)(?!\.?\d)", r"(\1+\2)"),  # 2 1/2 -> (2+1/2)
    (r"([\^_]) ?\{ ?(-?\d+|[A-Za-z]) ?\} ?", r"\1\2 "),  # x^{2}y -> x^2 y
    (r"(?<![A-Za-z\\])@?[A-Za-z]{2,}( [A-Za-z]{2,})*",  # No solution -> nosolution
     lambda m: m[0].lower().replace(" ", "")),
    (r"^ +|[ .,;:]+$", "")]]  # 5. -> 5
NAME = re.compile(r"@[A-Za-z]*(?:/[a-z]+)?|\d+_\d+|(?:[A-Za-z]{2,}(?! ?\^)|[A-Za-zπ∞])(?:_\w+)?")
TOKEN = re.compile(NAME.pattern + r"|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?|\\frac|[^\s¦]")
GOLD_LHS = r"((\\?[A-Za-z]+(_{?\w+}?)? ?( ?\([A-Za-z, ]*\))?|\([A-Za-z, ]+\)) *=)?"  # x =, f(x) =
REPLY_LHS = r"((?=[^=]*[A-Za-z])([_^(]\d+|[^\d=,;]|\([A-Za-z]+(, ?[A-Za-z]+)+\))+=)?"  # AB + AC =
APPLY = {"+": (1, op.add), "-": (1, op.sub), "*": (2, op.mul), "/": (2, op.truediv), "^": (3, pow)}

def _evaluate(tokens: list[str], level: int = 0) -> Fraction:
    """Precedence climbing over reversed tokens, up to a closing bracket; ValueError: no number."""
    token = tokens.pop()
    if token in "+-":
        value = _evaluate(tokens, max(level, 1)) * int(token + "1")
    elif token in "({":
        value, _ = _evaluate(tokens), tokens.pop()  # brackets are balanced already
    elif token == r"\frac":
        value = _evaluate(tokens, 3) / _evaluate(tokens, 3)
    elif token == "√":
        value = Fraction(math.isqrt(int(_evaluate(tokens, 3) * 10**800)), 10**400)
    else:  # the same name, the same fraction
        name = NAME.fullmatch(token) and random.Random(token).getrandbits(200)
        value = Fraction(name, 10**60 + 7) if name else Fraction(token)
    while tokens[-1] not in ")}" and APPLY.get(tokens[-1], APPLY["*"])[0] > level:
        sign = tokens.pop() if tokens[-1] in APPLY else ""
        hedge = sign == "" and (value == 0 or tokens[-1][0] in ".0123456789")  # 0 apples; 5 6
        precedence, apply = APPLY[sign or "*"]
        right = _evaluate(tokens, precedence)
        power = abs(right) if sign == "^" else 1
        bits = power * (value.numerator * value.denominator).bit_length()
        if hedge or bits > MAX_BITS or power.denominator > 1:
            raise ValueError("two answers, or too large, or a root")
        value = apply(value, right)
    return value

def _split(text: str, marks: str) -> list[str]:
    """Split outside all brackets; nothing comes back where brackets do not match."""
    depths = [*accumulate((char in "([{") - (char in ")]}") for char in text)]
    cut = ["\0" if depth == 0 and char in marks else char for char, depth in zip(text, depths)]
    parts = "".join(cut).split("\0") if set(depths) <= set(range(MAX_DEPTH)) else []
    return [part.strip() for part in parts if part.strip()]

def _canonical(text: str) -> tuple:
    """A hashable form of a rewritten answer; equal forms are equal answers."""
    pair, inside = text[:1] + text[-1:], _split(text[1:-1], ",;")
    if inside and pair == "{}":
        return _canonical(text[1:-1].strip())
    items = [t.replace("±", s) for t in _split(text, ",;") for s in ("+-" if "±" in t else "+")]
    for kind, parts in ("list", items), ("union", _split(text, "∪")), ("equal", _split(text, "=")):
        if len(parts) > 1:
            forms = frozenset(Counter(map(_canonical, parts)).items())  # no order; 2 + 3 = 5 is 5
            return (kind, forms) if kind == "list" or len(forms) > 1 else _canonical(parts[0])
    if len(sides := re.split("([<>≤≥])", text)) > 1:
        if sides[1] in ">≥":  # x ≥ 5 is 5 ≤ x
            sides = [side.translate(str.maketrans(">≥<≤", "<≤>≥")) for side in sides[::-1]]
        return "order", *sides[1::2], *map(_canonical, sides[::2])
    if len(inside) > (pair != "[]") and pair in ("()", "[]", "(]", "[)"):  # (2,251,252); [(1,2)]
        return pair, *map(_canonical, inside)
    try:  # with free names, a bag of terms: 2x + 3 is 3 + 2x, but to expand or collect is algebra
        free = set(filter(NAME.fullmatch, TOKEN.findall(text))) - {"π", "e", "i"}
        terms = _split(re.sub(r"(?<!\^)(?=[+-])", "¦", text) if free else text, "¦,;") or "?"
        return "value", *sorted(round(_evaluate(TOKEN.findall(t + ")")[::-1]), 300) for t in terms)
    except (ValueError, IndexError, ZeroDivisionError, RecursionError):
        return "text", re.sub(r"(?<!\d) | (?!\d)", "", text)

def _same(gold: str, reply: str) -> bool:
    if gold == reply or len(gold + reply) > MAX_ANSWER:
        return gold.strip() == reply.strip() != ""
    for pattern, new in RULES:
        gold, reply = pattern.sub(new, gold), pattern.sub(new, reply)
    if ("=" in gold) != ("=" in reply):  # one of them says x =
        gold = gold.replace(re.match(GOLD_LHS, gold)[0], "").strip()
        reply = reply.replace(re.match(REPLY_LHS, reply)[0], "").strip()
    readings = [reply]
    if ("@" in gold) != ("@" in reply):  # one of them has a unit
        gold, reply = sorted((gold, reply), key=lambda text: "@" in text)
        bare = re.sub(r"@[A-Za-z]*(/[a-z]+)?( ?\^ ?-?\d)?", " ", reply).strip()
        readings = [bare, reply.replace("@percent", "/100")]
    return gold != "" and _canonical(gold) in map(_canonical, readings)

def extract_answer(response: str) -> str | None:
    r"""Content of the \boxed{} or \fbox{} that closes last, after the last </think>, or None.
    An open <think> gives None. Where the prompt ends in <think>, pass "<think>" + completion.
    >>> extract_answer(r"<think> \boxed{1}? </think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    tail = response.rpartition("</think>")[2]
    opened, answer = [], None
    for match in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\\.|\}", tail[-MAX_RESPONSE:]):
        if match[0] == "}" and opened and (start := opened.pop()):
            answer = match.string[start:match.start()]
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append(match.end() if match[1] else 0)  # 0: a brace, not a box
    return None if "<think>" in tail else answer

def is_correct(response: str, answer: str | float | list) -> bool:
    r"""True if the boxed answer has the value and the structure of `answer`, or of any in a list.
    >>> is_correct(r"So \boxed{x = 0.5}.", r"\frac12"), is_correct(r"\boxed{5 \text{ or } 6}", 5)
    (True, False)
    """
    reply, golds = extract_answer(response), answer if type(answer) in (list, tuple) else [answer]
    return reply is not None and any(_same(str(gold), reply) for gold in golds if gold is not None)
