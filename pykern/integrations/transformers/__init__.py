"""Hugging Face transformers on pykern: register() adds an attention implementation, patch(model) replaces its modules.

Neither name imports transformers before it is called; the extra is pykern[hf].
"""

from pykern.integrations.transformers.attention import register
from pykern.integrations.transformers.patch import Patch, patch

__all__ = ["Patch", "patch", "register"]
