"""An optimizer around another one: same parameter groups, same state, one complete state_dict."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

_PREFIX = "sam_core."  # of everything of ours in a state_dict, so that it cannot be mistaken for the base optimizer's


class OptimizerWrapper(Optimizer, ABC):
    """Base of all methods here: owns a base optimizer and adds the method's options and state to it.

    ``param_groups`` and ``state`` *are* those of ``base_optimizer``, so schedulers may be given either. What the method
    itself remembers is kept apart, since base optimizers take an empty state as the sign to initialise theirs.

    ``torch.distributed.checkpoint`` loads what a fresh optimizer would save, so :meth:`state_dict` has the same entries
    at all times. It has a fresh one make its moments by ``step(closure=None)`` on gradients that are zero, with lr = 0:
    that is the base optimizer's step alone. Weights stay where they are, the method counts and remembers nothing, and
    :class:`MSAM` gets no momentum from it.

    Args:
        params: parameters, named parameters or parameter groups; a group may hold the method's options.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        method_defaults: the method's own options, for groups that do not set them.
        foreach: handed to the base optimizer if it takes it.
        **kwargs: arguments of ``base_optimizer``, e.g. ``lr``.

    Raises:
        ValueError: for a bad option.
    """

    #: The closure returns each sample's loss instead of calling backward: see :class:`EfficientSAM`.
    takes_sample_losses: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        method_defaults: dict[str, Any],
        *,
        foreach: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            raise ValueError(
                f"base_optimizer must be an optimizer class, e.g. torch.optim.AdamW, got {base_optimizer!r}."
            )
        closure = inspect.signature(base_optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"base_optimizer must step without a closure, got {base_optimizer.__name__}.")
        if foreach is not None and "foreach" in inspect.signature(base_optimizer).parameters:
            kwargs["foreach"] = foreach
        self.foreach = foreach
        self._method_defaults = method_defaults
        self._method_state: dict[Tensor, dict[str, Any]] = {}  # by parameter; never cast, unlike a base optimizer's
        self._counters: dict[str, int] = {}  # of the method as a whole; saved with every group
        self.base_optimizer = base_optimizer(params, **kwargs)
        self.base_optimizer.defaults.update(method_defaults)  # its add_param_group fills them in as well
        base_state = self.base_optimizer.state  # Adagrad fills it on construction, Optimizer.__init__ empties it
        super().__init__(self.base_optimizer.param_groups, self.base_optimizer.defaults)
        self.state = base_state

    @abstractmethod
    def step(
        self,
        closure: Callable[..., Any] | None = None,
        *,
        grads_ready: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        ascent_context: Callable[[], AbstractContextManager[Any]] | AbstractContextManager[Any] | None = None,
    ) -> Any:
        """One whole step of the method; see its class."""

    @property
    def in_second_pass(self) -> bool:
        """Whether a step is begun: a closure called now runs at w + perturbation, and BatchNorm must not count it."""
        return False

    def second_pass_is_due(self) -> bool:
        """Whether the coming step needs a gradient at a second point; loops that run the passes themselves ask."""
        return False

    @contextmanager
    def at_weights(self) -> Iterator[None]:
        """Within the block the parameters are the clean weights w, for evaluation and saving.

        Between steps they are so anyway, except for :class:`MSAM`'s.
        """
        yield

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError if the method's options in a parameter group are bad."""

    def _unknown(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """What is saved of a parameter that the method does not know yet, under the names of ``_method_state``.

        Its values count for nothing, but torch.distributed.checkpoint loads into tensors of a fresh optimizer alone.
        """
        return {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's own state: its moments, by parameter."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it leaves out, the method's among them, take the optimizer's defaults.

        Raises:
            ValueError: for a bad option.
        """
        group = {**self._method_defaults, **param_group}
        self._check_group(group)
        self.base_optimizer.add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs; what is not the base optimizer's has keys that start with "sam_core.".

        These are always the same: where the method knows nothing yet there are zeros, and "sam_core.known" is False.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = self.base_optimizer.state_dict()
        for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
            packed.update(_prefixed({"method": type(self).__name__, **self._counters}))
            for param, number in zip(group["params"], packed["params"], strict=True):
                known = param in self._method_state
                own = self._method_state[param] if known else self._unknown(param, group) if param.requires_grad else {}
                if own:
                    # A new dict: the one in there is the live one that the base optimizer steps with.
                    own = _prefixed({**own, "known": known})
                    saved["state"][number] = {**saved["state"].get(number, {}), **own}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` saved, or what the base optimizer alone saved: then the options stay.

        Args:
            state_dict: of an optimizer with the same groups.

        Raises:
            ValueError: if the groups differ, it is of another method, whose state and weights mean something else, or
                torch.distributed.checkpoint has flattened it.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = [_split(group) for group in state_dict["param_groups"]]
        for base, own in groups:
            # Only torch.distributed.checkpoint writes names, not numbers.
            by_name = any(isinstance(name, str) for name in base["params"])
            if by_name and not own and base.keys() & self._method_defaults:
                raise ValueError(
                    f"state_dict must hold entries '{_PREFIX}*' of {type(self).__name__}, got none: torch drops them "
                    "with StateDictOptions(flatten_optimizer_state_dict=True). Save and load without it."
                )
            method = own.pop("method", type(self).__name__)
            if method != type(self).__name__:
                raise ValueError(
                    f"state_dict must be that of {type(self).__name__}, got that of {method}. To change the method, "
                    f"take the moments alone: save {method}'s base_optimizer.state_dict(), at the clean weights."
                )
        state = {number: _split(values) for number, values in state_dict["state"].items()}
        options = [{name: group[name] for name in self._method_defaults} for group in self.param_groups]
        self.base_optimizer.load_state_dict(
            {
                "param_groups": [base for base, _ in groups],
                "state": {number: base for number, (base, own) in state.items() if base or not own},
            }
        )
        self._method_state = {}
        for group, option, (saved, counters) in zip(self.param_groups, options, groups, strict=True):
            group.update({name: value for name, value in option.items() if name not in group})
            self._counters.update(counters)
            for param, number in zip(group["params"], saved["params"], strict=True):
                own = state[number][1] if number in state else {}
                if own.pop("known", bool(own)):
                    self._method_state[param] = {name: _copied(value, param) for name, value in own.items()}
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all but hooks and what schedulers hang on the object, as for any torch optimizer."""
        own = {name: value for name, value in self.__dict__.items() if not name.startswith("_optimizer_")}
        return {name: value for name, value in own.items() if name not in ("step", "_zero_grad_profile_name")}

    def _params_with_grad(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _describe(self, param: Tensor) -> str:
        """A parameter by its number, its name if the optimizer was given names, and its shape."""
        number = 0
        for group in self.param_groups:
            for i, candidate in enumerate(group["params"]):
                if candidate is param:
                    name = f" '{group['param_names'][i]}'" if "param_names" in group else ""
                    return f"parameter {number}{name} with shape {list(param.shape)}"
                number += 1
        raise AssertionError("the parameter belongs to no group")


def _prefixed(values: dict[str, Any]) -> dict[str, Any]:
    return {_PREFIX + name: value for name, value in values.items()}


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base optimizer's entries, and the method's without their prefix."""
    base = {name: value for name, value in values.items() if not name.startswith(_PREFIX)}
    own = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
    return base, own


def _copied(value: Any, param: Tensor) -> Any:
    """A tensor on the parameter's device in its own dtype, not shared with the file it came from."""
    return value.detach().to(device=param.device, copy=True) if isinstance(value, Tensor) else value
