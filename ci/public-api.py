"""Prints the public interface of a crate, from rustdoc's JSON: a line for each item, with its path and how it is declared, in
the words of the source; and a line for each type with what it implements. For ci/public-api.sh."""
import json
import re
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    crate = json.load(file)
index = {int(number): item for number, item in crate["index"].items()}
# Where the declaration of an item with a body ends; of others it is all of it.
BODY = dict.fromkeys(("function", "impl", "enum", "trait"), r"\s\{") | {"struct": r"\s\{|[(;]"}
# Of what the compiler finds out by itself, what users lean on.
AUTO = "Send", "Sync"
lines = set()


def items(numbers):
    return [index[number] for number in numbers]


def declaration(item, kind):
    """What stands in the source, on one line, without comments, attributes and body."""
    (first, left), (last, right) = item["span"]["begin"], item["span"]["end"]
    with open(item["span"]["filename"], encoding="utf-8") as file:
        rows = file.read().split("\n")[first - 1:last]
    rows[-1] = rows[-1][:right - 1]
    rows[0] = rows[0][left - 1:]
    text = re.sub(r"//.*|^\s*#\[.*\]$", "", "\n".join(rows), flags=re.MULTILINE)
    # A function may be written within a macro.
    text = re.sub(r"^\w+!\s*\{\s*", "", text)
    text = re.split(BODY.get(kind, "$"), text, maxsplit=1)[0]
    text = re.sub(r"\s+", " ", text).strip(" ,;")
    # A list in lines of its own is the same as in one; that an argument is `mut` is nobody's business.
    return re.sub(r"(?<=\() |,? (?=\))|,(?= \})|\bmut (?=\w+: )", "", text)


def implemented(path, numbers):
    """Tells what is in a type's implementations, and returns the traits among them."""
    for item in items(numbers):
        inner = item["inner"]["impl"]
        trait, bounded = inner["trait"], inner["generics"]["params"]
        if trait and (inner["blanket_impl"] or inner["is_synthetic"] and trait["path"] not in AUTO):
            continue
        written = item["span"] and not item["attrs"]
        head = declaration(item, "impl") if written else ""
        if trait:
            name = trait["path"].split("::")[-1]
            yield f"`{head}`" if written and (trait["args"] or bounded) else "!" * inner["is_negative"] + name
        for child in items(inner["items"]):
            if not trait or written and "assoc_type" in child["inner"]:
                walk(path, child, f" in {head}" if trait or bounded else "")


def walk(path, item, within=""):
    kind, inner = next(iter(item["inner"].items()))
    if kind == "use" and inner["id"] not in index:
        lines.add(f"{path}::{inner['name']}: pub use {inner['source']}")
    elif kind == "use":
        target = index[inner["id"]]
        for item in items(target["inner"]["module"]["items"]) if inner["is_glob"] else [target]:
            walk(path, item)
    else:
        path = f"{path}::{item['name']}"
        text = f"pub mod {item['name']}" if kind == "module" else declaration(item, kind)
        exhaustive = "#[non_exhaustive] " * ("non_exhaustive" in str(item["attrs"]))
        lines.add(f"{path}: {exhaustive}{text}{within}")
        fields = inner["kind"].get("plain", {}).get("fields", []) if kind == "struct" and inner["kind"] != "unit" else []
        for child in items(fields + inner.get("variants", []) + (inner.get("items") or [])):
            walk(path, child)
        traits = sorted(set(implemented(path, inner.get("impls", []))) - {"StructuralPartialEq"})
        if traits:
            lines.add(f"{path} implements {', '.join(traits)}")


root = index[crate["root"]]
for item in items(root["inner"]["module"]["items"]):
    walk(root["name"], item)
print("\n".join(sorted(lines)))
