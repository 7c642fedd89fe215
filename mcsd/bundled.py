"""Names of what ships with the package, for modules that must not import anything heavy, too."""

DEFAULT_TARGET = "smollm2-135m-instruct"
BUNDLED_DRAFTS = ("smollm2-feature", "smollm2-draft")
DEFAULT_DRAFT = BUNDLED_DRAFTS[0]
