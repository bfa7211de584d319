"""On-disk formats: what a file is (`detect`), into canonical form (`read`), out of it (`write`), and releases.

from hubsae.formats import detect, read, write, convert, Release, package
"""

from hubsae.formats.base import Files, Format, Overrides, Probe, ReadWarning
from hubsae.formats.cross_layer import read_cross_layer
from hubsae.formats.detection import FORMATS, Reading, choose, detect
from hubsae.formats.manifest import FileEntry, Manifest, SAEEntry
from hubsae.formats.package import PackagePlan, PlannedSAE, package, plan
from hubsae.formats.registry import convert, read, write, write_also
from hubsae.formats.release import Release
from hubsae.formats.saelens_config import Fidelity, fidelity
from hubsae.formats.select import pick, select
from hubsae.formats.spec import PackageSpec
from hubsae.formats.thresholds import estimate_threshold

__all__ = [
    "FORMATS",
    "Fidelity",
    "FileEntry",
    "Files",
    "Format",
    "Manifest",
    "Overrides",
    "PackagePlan",
    "PackageSpec",
    "PlannedSAE",
    "Probe",
    "ReadWarning",
    "Reading",
    "Release",
    "SAEEntry",
    "choose",
    "convert",
    "detect",
    "estimate_threshold",
    "fidelity",
    "package",
    "pick",
    "plan",
    "read",
    "read_cross_layer",
    "select",
    "write",
    "write_also",
]
