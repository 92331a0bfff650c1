"""``untraced``: torch.compile leaves a function to Python, because of what it writes on the optimizer or looks at.

Torch loses, without a word, what compiled code writes on an optimizer itself: it keeps changes of the objects there.
The public ``torch.compiler.disable`` does the same, but imports the compiler at once, which takes seconds.
"""

from torch._compile import _disable_dynamo as untraced

__all__ = ["untraced"]
