"""Checks what `cargo tree` prints (package|licence) against deny.toml. For ci/licences.sh."""
import re
import sys
import tomllib

with open("deny.toml", "rb") as file:
    deny = tomllib.load(file)
allowed = set(deny["licenses"]["allow"])
exceptions = {one["crate"]: set(one["allow"]) for one in deny["licenses"]["exceptions"]}
skipped = [one["crate"] for one in deny["bans"]["skip"]]


def satisfied(licence, names):
    """Whether an SPDX expression holds with these licences; "/" is what "OR" was once."""
    def word(match):
        return {"OR": "or", "AND": "and"}.get(match[0], str(match[0] in names))
    return eval(re.sub(r"[\w.+-]+( WITH [\w.+-]+)?", word, licence.replace("/", " OR ")) or "False")


bad, versions = set(), {}
for line in filter(str.strip, sys.stdin):
    package, licence = line.rstrip().removesuffix(" (*)").split("|")
    name, version, source = re.fullmatch(r"(\S+) v(\S+)(?: \(proc-macro\))?(?: \((.*)\))?", package).groups()
    versions.setdefault(name, set()).add(version)
    if not satisfied(licence, allowed | exceptions.get(name, set())):
        bad.add(f"{name} {version} has licence {licence or 'none'}, which deny.toml does not allow")
    if source and not source.startswith("/"):
        bad.add(f"{name} {version} comes from {source}")
for name, several in versions.items():
    left = {one for one in several if not any(f"{name}@{one}.".startswith(f"{spec}.") for spec in skipped)}
    if len(left) > 1:
        bad.add(f"{name} is there as {' and '.join(sorted(several))}")
print(f"licences: {sys.argv[1]}: {len(versions)} packages")
sys.exit("\n".join(f"licences: {what}" for what in sorted(bad)) or None)
