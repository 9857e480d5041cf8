"""``TieredTrainPipeline``: TorchRec's train pipeline with eyes for what comes.

Batches in flight, the oldest first, with ``d = prefetch_depth`` and a lookahead window of ``w`` batches:

    0            trains in this step: forward, backward, optimizer
    1 … d        prefetched: their rows are on their way into slots, or there
    d+1 … d+w    announced: their ids have been exchanged, and eviction knows when their rows come
    d+w+1        in transit: its ids are being exchanged while batch 0 trains

So in a step, batch d is prefetched, d+w announced, and d+w+1 loaded; its splits travel during the forward, its ids during the
backward. Announcing and prefetching come first: native threads read while the dataloader and the model run.

What is held of a batch until its turn is the batch as the dataloader gave it, on the host, and on the device its ids as input dist
has brought them: a ticket is found by the identity of their tensor, so they are kept, not made again. They stay until their step has
ended, so a step whose forward raised may be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import PrefetchTrainPipelineContext
from torchrec.distributed.train_pipeline.runtime_forwards import PrefetchPipelinedForward
from torchrec.distributed.train_pipeline.utils import _start_data_dist, _to_device, _wait_for_batch, use_context_for_postprocs

from .batch_bytes import batch_bytes
from .coming_ids import announce, prefetch, withdraw
from .errors import ConfigurationError
from .groups import tiered_groups
from .kernels.spans import span
from .lookahead import LOOKAHEAD_BYTES, Lookahead

ASK_EVERY = 8
"""Batches from one look at what the pools can use to the next."""

MOST_PREFETCHED = 16  # guess: one or two hide the reads, and each pins its rows


@dataclass
class BatchInFlight(PrefetchTrainPipelineContext):
    """How far a batch has come. ``bytes``: what it holds, once somebody asked."""

    started: bool = False
    exchanging: bool = False
    arrived: bool = False
    announced: bool = False
    prefetched: bool = False
    on_device: bool = False
    bytes: int = 0


class _ArgumentsOnDevice:
    """The arguments of a sharded module, taken from a batch on the host, on the device: the rest of the batch stays where it is."""

    def __init__(self, args: Any, device: torch.device) -> None:
        self._args, self._device = args, device

    def build_args_kwargs(self, batch: Any) -> tuple[list[Any], dict[str, Any]]:
        """As TorchRec's ``CallArgs``."""
        args, kwargs = self._args.build_args_kwargs(batch)
        return [self._moved(a) for a in args], {name: self._moved(a) for name, a in kwargs.items()}

    def _moved(self, arg: Any) -> Any:
        return arg.to(device=self._device, non_blocking=True) if hasattr(arg, "to") else arg


class _TieredForward(PrefetchPipelinedForward):
    """Stands for the forward of a sharded module: its ids have arrived and stay until the step has ended."""

    @property
    def args(self) -> Any:
        """Where the module's arguments are in a batch."""
        return self._args if self._stream is None else _ArgumentsOnDevice(self._args, self._stream.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids, context = self._context.module_input_post_prefetch[self._name], self._context.module_contexts_post_prefetch[self._name]
        if self._stream is not None:
            current = torch.get_device_module(self._stream.device).current_stream()
            current.wait_stream(self._stream)
            ids.record_stream(current)
            context.record_stream(current)
        return self._module.compute_and_output_dist(context, ids)


class TieredTrainPipeline(TrainPipelineSparseDist):
    """Trains a model with tiered tables; their rows arrive before their batch's turn, and leave when they are needed last.

    Used as TorchRec's pipelines are: ``progress(iterator)`` trains one batch and returns its output, and raises StopIteration when
    the iterator has ended and every batch in flight has trained. The same bits as without a pipeline, for any arguments.

    ``prefetch_depth``: batches whose rows are brought into slots ahead of their turn; 0: none.
    ``lookahead``: further batches whose ids eviction knows; None: what the slot pools can use; 0: none.
    ``lookahead_bytes``: what those may hold in memory on this rank. On several ranks the smallest window of all is that of all.
    ``pipeline_postproc``, ``custom_model_fwd``, ``apply_jit``: as TorchRec's.

    A checkpoint between steps has the trained batches alone, ``trained_batches`` of them by this pipeline; batches in flight come again
    from the iterator of whoever resumes. After ``load_checkpoint`` in a job that goes on, call ``reset`` and begin a new iterator.

    Raises: ConfigurationError.
    """

    _pipelined_forward_type = _TieredForward
    contexts: Any
    _model: nn.Module
    _pipelined_modules: list[Any]
    _pipelined_postprocs: list[Any]

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        prefetch_depth: int = 2,
        lookahead: int | None = None,
        lookahead_bytes: int = LOOKAHEAD_BYTES,
        apply_jit: bool = False,
        pipeline_postproc: bool = True,
        custom_model_fwd: Callable[[Any], tuple[torch.Tensor, Any]] | None = None,
        dmp_collection_sync_interval_batches: int | None = 1,
    ) -> None:
        if not 0 <= prefetch_depth <= MOST_PREFETCHED:
            raise ConfigurationError(f"prefetch_depth must be 0 to {MOST_PREFETCHED} batches, got {prefetch_depth}")
        self.prefetch_depth, self._lookahead = prefetch_depth, Lookahead(lookahead, lookahead_bytes)
        self.trained_batches = 0
        self._usable = 0
        super().__init__(
            model,
            optimizer,
            device,
            apply_jit=apply_jit,
            context_type=BatchInFlight,
            pipeline_postproc=pipeline_postproc,
            custom_model_fwd=custom_model_fwd,
            dmp_collection_sync_interval_batches=dmp_collection_sync_interval_batches,
        )
        self._custom_forward = custom_model_fwd
        self._prefetch_stream = None
        if device.type == "cpu":
            self._stream_context = nullcontext
        else:
            self._prefetch_stream = torch.get_device_module(device).Stream()

    @property
    def lookahead(self) -> int:
        """The lookahead window now, in batches."""
        return self._lookahead.batches

    # -- a step

    def progress(self, dataloader_iter: Iterator[Any]) -> Any:
        """Trains the next batch, or in eval mode runs its forward. Returns the second of what the model returns."""
        if not self._model_attached:
            self.attach(self._model)
        self._lookahead.agree()
        if not self.batches:
            self._load(dataloader_iter, 1 + self.prefetch_depth)
        if not self.batches:
            raise StopIteration
        self._ask_pools()
        self._look_ahead()
        self._load(dataloader_iter, 2)
        self._propose_window()
        output = self._train(self.contexts[0])
        self.dequeue_batch()
        return output

    def _train(self, context: BatchInFlight) -> Any:
        self._set_module_context(context)
        if self._model.training:
            with span("zero_grad"):
                self._optimizer.zero_grad()
        batch = self._on_device(0)
        _wait_for_batch(batch, self._memcpy_stream)
        if self._prefetch_stream is not None:
            torch.get_device_module(self._device).current_stream().wait_stream(self._prefetch_stream)
        with span(f"forward {context.index}"):
            losses, output = (self._custom_forward or self._model)(batch)
        self._exchange_ids()
        if len(self.batches) > 1:
            self._on_device(1)  # its copy overlaps this batch's backward
        if self._model.training:
            with span(f"backward {context.index}"):
                torch.sum(losses, dim=0).backward()
            self.sync_embeddings(self._model, self._dmp_collection_sync_interval_batches, context)
            with span(f"optimizer {context.index}"):
                self._optimizer.step()
            self.trained_batches += 1
        return output

    # -- batches in flight

    def _load(self, dataloader_iter: Iterator[Any], most: int) -> None:
        """Up to ``most`` batches, while there is room in flight; the exchange of their ids begins."""
        room = 1 + self.prefetch_depth + self._lookahead.batches + 1 - len(self.batches)
        for _ in range(min(most, room)):
            batch = self._next_batch(dataloader_iter)
            if batch is None:
                return
            context = self._create_context()
            self.batches.append(batch)
            self.contexts.append(context)
            self._start(len(self.batches) - 1)

    def _start(self, place: int) -> None:
        context = self.contexts[place]
        context.started = True
        if not self._pipelined_modules:
            self._take_over_input_dist(self.batches[place], context)
            return
        if self._pipelined_postprocs:
            self._on_device(place)  # modules on the device make ids of it
        self.start_sparse_data_dist(self.batches[place], context)

    def _take_over_input_dist(self, batch: Any, context: BatchInFlight) -> None:
        """TorchRec's rewriting of the model. It lets the modules of a rank exchange their sizes at once; a rank that is alone has none to
        exchange, and input dist as it was knows that."""
        self._pipeline_model(batch, context, self._pipelined_forward_type)
        if self._alone:
            for module in self._pipelined_modules:
                for input_dist in (d for child in module.modules() for d in getattr(child, "_input_dists", ())):
                    if hasattr(input_dist, "_dist"):
                        vars(input_dist._dist).pop("forward", None)

    def start_sparse_data_dist(self, batch: Any, context: Any) -> None:
        """Begins input dist with the sizes of what ranks will exchange."""
        with (
            span(f"start_sparse_data_dist {context.index}"),
            self._stream_context(self._data_dist_stream),
            use_context_for_postprocs(self._pipelined_postprocs, context),
        ):
            _start_data_dist(self._pipelined_modules, batch, context)

    def _exchange_ids(self) -> None:
        """Whose sizes are known by now, the exchange of their ids begins."""
        for context in self.contexts:
            if context.started and not context.exchanging:
                self.wait_sparse_data_dist(context)
                context.exchanging = True

    def _look_ahead(self) -> None:
        """Ids arrive; their batches are announced and prefetched."""
        if not self.contexts[min(self.prefetch_depth, len(self.contexts) - 1)].exchanging:
            self._exchange_ids()  # the first step: nothing has trained meanwhile
        for place, context in enumerate(self.contexts):
            if context.exchanging and not context.arrived:
                self._arrive(context)
            if place > self.prefetch_depth and context.arrived and not context.announced:
                with span(f"announce {context.index}"):
                    context.announced = announce(self._ids(context))
                if not context.announced:
                    break  # others have announced batches to the same tables; those in flight keep their order
        for context in list(self.contexts)[1 : 1 + self.prefetch_depth]:
            if not context.prefetched:
                self._prefetch(context)

    def _arrive(self, context: BatchInFlight) -> None:
        with span(f"wait_input_dist {context.index}"), self._stream_context(self._data_dist_stream):
            for module in self._pipelined_modules:
                name = module.forward.name
                context.module_input_post_prefetch[name] = context.input_dist_tensors_requests.pop(name).wait()
                context.module_contexts_post_prefetch[name] = context.module_contexts.pop(name)
        context.arrived = True

    def _prefetch(self, context: BatchInFlight) -> None:
        with span(f"prefetch {context.index}"):
            forward_stream = None
            if self._prefetch_stream is not None:
                assert self._data_dist_stream is not None
                forward_stream = torch.get_device_module(self._device).current_stream()
                self._prefetch_stream.wait_stream(self._data_dist_stream)
            with self._stream_context(self._prefetch_stream):
                for module, ids in self._ids(context):
                    module_context = context.module_contexts_post_prefetch[module.forward.name]
                    if self._prefetch_stream is not None:
                        ids.record_stream(self._prefetch_stream)
                        module_context.record_stream(self._prefetch_stream)
                prefetch(self._ids(context), forward_stream)
        context.prefetched = True

    def _ids(self, context: BatchInFlight) -> list[tuple[Any, Any]]:
        """The pipelined modules and the ids that the batch has for each."""
        return [(module, context.module_input_post_prefetch[module.forward.name]) for module in self._pipelined_modules]

    def _on_device(self, place: int) -> Any:
        context = self.contexts[place]
        if not context.on_device:
            with span(f"copy_batch_to_device {context.index}"), self._stream_context(self._memcpy_stream):
                self.batches[place] = _to_device(self.batches[place], self._device, non_blocking=True)
            context.on_device = True
        return self.batches[place]

    # -- the window

    def _ask_pools(self) -> None:
        """What the slot pools of this rank can use. Before prefetching: pools answer when what was prefetched has begun."""
        if self._lookahead.asked is None and self.contexts[0].index % ASK_EVERY == 0:
            self._usable = max((group.useful_lookahead for group in tiered_groups(self._model)), default=0)

    def _propose_window(self) -> None:
        asked = self._lookahead.asked
        wish = self._usable if asked is None else asked
        if asked == 0 or (wish == 0 and self._alone):
            return
        for batch, context in zip(self.batches, self.contexts, strict=True):
            if context.arrived and not context.bytes:
                context.bytes = batch_bytes(batch, *context.module_input_post_prefetch.values())
        held = [context.bytes for context in self.contexts]
        self._lookahead.propose(held[2 + self.prefetch_depth :], max(held), wish, self._process_group, self._device)

    @property
    def _process_group(self) -> dist.ProcessGroup | None:
        return next((module._env.process_group for module in self._pipelined_modules), None)

    @property
    def _alone(self) -> bool:
        pg = self._process_group
        return pg is None or pg.size() == 1

    # -- the model

    def detach(self) -> nn.Module:
        """The model as it was, to be used without the pipeline. Batches in flight are kept; ``progress`` goes on with them."""
        self._withdraw()
        return super().detach()

    def attach(self, model: nn.Module | None = None, sparse_dist: bool = True) -> None:
        """Takes the model up again, or another one; the ids of batches in flight are then exchanged anew."""
        del sparse_dist  # TorchRec's pipelines may leave it to the next step; this one exchanges ids once
        if model is not None and model is not self._model:
            self._withdraw()
            self._model = model
            for place in range(len(self.contexts)):
                self.contexts[place] = self._context_type(index=self.contexts[place].index, version=1)
        self._model_attached = True
        self._pipelined_modules, self._pipelined_postprocs = [], []
        if self.contexts and self.contexts[0].started:
            # To make input dist, TorchRec wants a batch; this one's ids are there.
            scratch = self._context_type(index=self.contexts[0].index, version=1)
            self._take_over_input_dist(self.batches[0], scratch)
        else:
            for place in range(len(self.contexts)):
                self._start(place)

    def reset(self) -> None:
        """Forgets the batches in flight."""
        self._withdraw()
        super().reset()

    def _withdraw(self) -> None:
        """Slot pools forget what was announced and prefetched: nobody knows now whether it will train."""
        for context in self.contexts:
            if context.announced or context.prefetched:
                withdraw(self._ids(context))
            context.announced = context.prefetched = False
