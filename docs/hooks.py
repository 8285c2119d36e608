"""What mkdocs does beside turning docs/*.md into pages: see mkdocs.yml.

Files outside docs/ become part of the site, so that every link of a page leads somewhere without a network:
README.md, CHANGELOG.md and CONTRIBUTING.md as pages of the navigation, a source file that a page links to as a page
with its text, data as they are. A fenced block named math, LaTeX, becomes MathML, which browsers draw without a script.
"""

import os
import posixpath
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pymdownx.superfences import SuperFencesException

ROOT = Path(__file__).resolve().parent.parent
# page of the navigation -> the file of the repository that it shows
SHOWN = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
PAGE_OF = {file: page for page, file in SHOWN.items()}
AS_THEY_ARE = (".json", ".png", ".svg", ".html")  # copied; any other file outside docs/ is shown as text

CODE = re.compile(r"^(`{3,}).*?^\1`*$|^(?: {4}|\t).*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^()\s]+)(\))")


def is_relative(target: str) -> bool:
    return not re.match(r"[a-z]+:|#|/", target)


def without_code(markdown: str) -> str:
    """The text with code replaced by spaces: as long as before, and no link in it is one that only looks like it."""
    return CODE.sub(lambda code: re.sub(r"\S", " ", code.group()), markdown)


def place_of(file: str) -> str:
    """Where the site has a file of the repository, both as paths from the top."""
    if file in PAGE_OF:
        return PAGE_OF[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return f"source/{file}" + ("" if file.endswith(AS_THEY_ARE) else ".md")


def linked(markdown: str, origin: str) -> set[str]:
    """The files of the repository that the text of the file `origin` links to."""
    targets = [target.partition("#")[0] for _, target, _ in LINK.findall(without_code(markdown)) if is_relative(target)]
    return {posixpath.normpath(posixpath.join(posixpath.dirname(origin), target)) for target in targets}


def moved(markdown: str, origin: str) -> str:
    """The text of the file `origin` with its links as they are in the site."""
    bare, here = without_code(markdown), posixpath.dirname(place_of(origin)) or "."

    def move(match: re.Match) -> str:
        target, hash_, anchor = match.group(2).partition("#")
        if not is_relative(match.group(2)) or bare[match.start() : match.end()] != match.group():
            return match.group()
        place = place_of(posixpath.normpath(posixpath.join(posixpath.dirname(origin), target)))
        return f"{match.group(1)}{posixpath.relpath(place, here)}{hash_}{anchor}{match.group(3)}"

    return LINK.sub(move, markdown)


def as_text(file: str) -> str:
    """A page that shows a source file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    language = {".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".py": "python", ".pyi": "python"}
    return f"# {file}\n\n{fence}{language.get(Path(file).suffix, 'text')}\n{text}\n{fence}\n"


def mathml(source: str, language: str, css_class: str, options: dict, md: object, **_: object) -> str:
    """A block of LaTeX as MathML."""
    try:
        return latex2mathml.converter.convert(source, display="block")
    except Exception as error:  # whatever the parser raises: superfences would show the source instead, without a word
        raise SuperFencesException(f"not a formula: {source!r}: {error}") from error


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fences = [{"name": "math", "class": "math", "format": mathml}]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what comes from outside docs/."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for page, file in SHOWN.items():
        texts[file] = (ROOT / file).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[file]))
    outside = {target for origin, text in texts.items() for target in linked(text, origin)}
    for file in sorted(outside - texts.keys()):
        if file.startswith(("docs/", "..")) or not (ROOT / file).is_file():
            continue  # a link of mkdocs' own, or one that leads nowhere, which mkdocs reports
        place = place_of(file)
        if file.endswith(AS_THEY_ARE):
            files.append(File.generated(config, place, abs_src_path=os.fspath(ROOT / file)))
        else:
            files.append(File.generated(config, place, content=as_text(file), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    place = page.file.src_uri
    if place.startswith("source/"):
        return markdown
    return moved(markdown, SHOWN.get(place, f"docs/{place}"))
