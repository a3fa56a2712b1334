"""Prepare this checkout for an upload: package indexes know neither the repository nor its folders.

    python .github/absolute_links.py https://github.com/OWNER/NAME TAG

README.md gets absolute links to the files and pictures of TAG, and setup.cfg the addresses of the project.
"""

import re
import sys
from pathlib import Path

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<target>[^)\s]+)\)")


def absolute(text: str, address: str, tag: str) -> str:
    """Return Markdown whose links to files of the repository are addresses."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found["picture"] else "blob"
        return f"{found['picture']}[{found['text']}]({address}/{kind}/{tag}/{found['target']})"

    return _LINK.sub(link, text)


def project_urls(address: str) -> str:
    """Return the lines of setup.cfg with the addresses that a package index shows."""
    addresses = {
        "Homepage": address,
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    return "project_urls =\n" + "".join(f"    {name} = {url}\n" for name, url in addresses.items())


def main() -> None:
    address, tag = sys.argv[1].rstrip("/"), sys.argv[2]
    readme, setup = Path("README.md"), Path("setup.cfg")
    if f'__version__ = "{tag.removeprefix("v")}"\n' not in Path("sharded_shampoo4/__init__.py").read_text():
        sys.exit(f"{tag} is not the version in sharded_shampoo4/__init__.py")
    readme.write_text(absolute(readme.read_text(), address, tag))
    setup.write_text(setup.read_text().replace("[options]\n", f"{project_urls(address)}\n[options]\n", 1))


if __name__ == "__main__":
    main()
