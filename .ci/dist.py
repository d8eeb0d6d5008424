"""Builds what is handed out, with nothing but the standard library.

    python3 .ci/dist.py [FOLDER]    ubp.pyz, the wheel and the sdist

It is also the build backend that pyproject.toml names (PEP 517), so that
`pip install .` needs no network. Archives depend on the sources only: names
are sorted and times fixed, so two builds of one tree are equal.
"""
import ast
import base64
import gzip
import hashlib
import io
import os
import re
import sys
import tarfile
import zipfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULES = ("ubp.py", "ubp_x86.py")
SDIST = MODULES + ("README.md", "LICENSE", "Makefile", "pyproject.toml",
                   ".gitignore", ".ci", "tests")
EPOCH = (1980, 1, 1, 0, 0, 0)          # the first that zip files can say


def read(name):
    """Return a file of the project as bytes."""
    with open(os.path.join(TOP, name), "rb") as file:
        return file.read()


def project():
    """Return the tables of pyproject.toml: {table: {key: value}}.

    Enough TOML for that file: a table or a `key = literal` a line. tomllib
    came with Python 3.11.
    """
    tables, table = {}, {}
    for line in read("pyproject.toml").decode().splitlines():
        if line.startswith("["):
            table = tables.setdefault(line.strip("[]"), {})
        elif "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            table[key.strip()] = ast.literal_eval(value.strip())
    return tables


def version():
    """Return __version__ of ubp.py, which is not imported for that."""
    return re.search(r'^__version__ = "([^"]+)"', read("ubp.py").decode(),
                     re.M).group(1)


def metadata():
    """Return the METADATA of the wheel and PKG-INFO of the sdist."""
    about = project()["project"]
    return "\n".join([
        "Metadata-Version: 2.1", "Name: " + about["name"],
        "Version: " + version(), "Summary: " + about["description"],
        "License: " + about["license"],
        "Requires-Python: " + about["requires-python"],
        "Description-Content-Type: text/markdown", "",
        read(about["readme"]).decode()])


def write_zip(file, files):
    """Append a zip of files, (path, bytes) each, to an open file."""
    with zipfile.ZipFile(file, "w") as archive:
        for path, data in files:
            entry = zipfile.ZipInfo(path, EPOCH)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)


def build_wheel(folder, config_settings=None, metadata_directory=None):
    """PEP 517: write the wheel into folder. -> its name."""
    stem = "ubp-" + version()
    info = stem + ".dist-info/"
    scripts = "".join("%s = %s\n" % pair for pair
                      in project()["project.scripts"].items())
    files = [(name, read(name)) for name in MODULES] + [
        (info + "LICENSE", read("LICENSE")),
        (info + "METADATA", metadata().encode()),
        (info + "WHEEL", b"Wheel-Version: 1.0\nGenerator: ubp\n"
                         b"Root-Is-Purelib: true\nTag: py3-none-any\n"),
        (info + "entry_points.txt",
         ("[console_scripts]\n" + scripts).encode())]
    record = "".join("%s,sha256=%s,%d\n" % (
        name, base64.urlsafe_b64encode(hashlib.sha256(data).digest())
        .rstrip(b"=").decode(), len(data)) for name, data in files)
    record += info + "RECORD,,\n"
    name = stem + "-py3-none-any.whl"
    with open(os.path.join(folder, name), "wb") as file:
        write_zip(file, files + [(info + "RECORD", record.encode())])
    return name


def sdist_names():
    """Return the paths of the files in the sdist, sorted."""
    names = []
    for name in SDIST:
        if not os.path.isdir(os.path.join(TOP, name)):
            names.append(name)
        for folder, folders, files in os.walk(os.path.join(TOP, name)):
            folders[:] = [part for part in folders
                          if part not in ("__pycache__", ".build")]
            names += [os.path.relpath(os.path.join(folder, part), TOP)
                      for part in files if not part.endswith(".pyc")]
    return sorted(names)


def build_sdist(folder, config_settings=None):
    """PEP 517: write the sdist into folder. -> its name."""
    stem = "ubp-" + version()
    name = stem + ".tar.gz"
    with open(os.path.join(folder, name), "wb") as file, gzip.GzipFile(
            "", "wb", 9, file, mtime=0) as stream, tarfile.open(
            None, "w", stream, format=tarfile.PAX_FORMAT) as sdist:
        for path in sdist_names() + ["PKG-INFO"]:
            is_made = path == "PKG-INFO"
            data = metadata().encode() if is_made else read(path)
            entry = tarfile.TarInfo("%s/%s" % (stem, path))
            entry.size = len(data)
            entry.mode = 0o644 if is_made else 0o755 & os.stat(
                os.path.join(TOP, path)).st_mode
            sdist.addfile(entry, io.BytesIO(data))
    return name


def build_pyz(folder):
    """Write ubp.pyz, one file that python3 runs, into folder. -> its name."""
    path = os.path.join(folder, "ubp.pyz")
    with open(path, "wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        write_zip(file, [(name, read(name)) for name in MODULES]
                  + [("__main__.py", b"import ubp\n\nubp.run()\n")])
    os.chmod(path, 0o755)
    return "ubp.pyz"


def main():
    """Build all three, and say where they are."""
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(TOP, "dist")
    os.makedirs(folder, exist_ok=True)
    for build in build_pyz, build_wheel, build_sdist:
        name = build(folder)
        print("%8d bytes  %s" % (os.path.getsize(os.path.join(folder, name)),
                                 os.path.join(folder, name)))


if __name__ == "__main__":
    main()
