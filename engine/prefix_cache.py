"""What the cache holds beyond the running requests: a tree of computed prefixes. Integers only.

Every node is one KV block with the tokens in it; a path from the root spells a prefix. Running requests share
the full blocks on their path. A block that is not full is a leaf: it is never shared but copied, and so is a
block within which a prompt diverges. Models with recurrent layers also need the state at the very position
where a prompt goes on: such states are kept as checkpoints, and a prefix is usable up to its deepest one.

Who may free what. A block is in exactly one of three hands: the pool's (free), a request's (it alone may write
it and give it back), or a node's. `extend` and `leave` pass a block from a request to the tree for good; after that
only the tree frees it: by eviction, least recently used leaf first, when `take_blocks` runs out of free ones, or
by `forget`. A node that a running request has acquired, or that has children, is never freed. A state slot is
likewise the pool's, a request's, or a checkpoint's; checkpoints are evicted when `take_slot` finds none free, those
at chunk boundaries before those at the ends of messages, prompts and generations.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mixbit.engine.blocks import BlockPool


@dataclass(eq=False, slots=True)
class Checkpoint:
    """The recurrent state after `position` tokens, in a slot. home: the table that holds it under `place`."""

    slot: int
    position: int
    lasting: bool  # false at chunk boundaries, which are the first to go
    home: dict[int, Checkpoint]
    place: int
    used: int
    node: Node | None = None  # the one that holds it; none while it is a running request's
    saved: bool = False  # for the disk tier: it is there, or on its way

    @property
    def alive(self) -> bool:
        """Whether it has not been evicted."""
        return self.home.get(self.place) is self


@dataclass(eq=False, slots=True)
class Node:
    """A block and its tokens. checkpoints: by how many of the tokens they come after, 1 .. len(tokens)."""

    parent: Node | None
    tokens: tuple[int, ...]
    block: int
    depth: int  # nodes from the root, this one included
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    users: int = 0  # running requests whose path leads here
    used: int = 0
    alive: bool = True
    saved: bool = False  # for the disk tier: it is there, or on its way
    key: bytes = b""  # for the disk tier


@dataclass(frozen=True, slots=True)
class Match:
    """The usable prefix of some tokens: `length` of them.

    node: the deepest whole block of it. source: where the rest of it lies, to be copied. checkpoint: of the
    recurrent state at `length`.
    """

    length: int
    node: Node
    source: Node | None = None
    checkpoint: Checkpoint | None = None


class PrefixCache:
    """The tree, and the pools of blocks and slots that it shares with the running requests."""

    def __init__(self, *, blocks: int, block_size: int, slots: int, recurrent: bool) -> None:
        self.block_size = block_size
        self.recurrent = recurrent
        self.blocks = BlockPool(blocks)
        self.slots = BlockPool(slots)
        self.root = Node(None, (), -1, 0)
        self.evictions = 0  # of blocks
        self.inserted: deque[Node | Checkpoint] | None = None  # where to tell of new nodes and lasting checkpoints
        self._nodes = 0
        self._unused = 0  # nodes without users: all can be freed, leaf by leaf
        self._clock = 0
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (used, number, node); outdated entries are skipped
        self._entries = 0
        self._checkpoints: dict[Checkpoint, None] = {}

    @property
    def available(self) -> int:
        """Blocks that `take_blocks` can provide."""
        return self.blocks.free + self._unused

    @property
    def cached(self) -> int:
        """Blocks that no running request uses and that hold a prefix."""
        return self._unused

    # --- lookup ---

    def match(self, tokens: Sequence[int], limit: int, known: Node | None = None) -> Match:
        """The longest usable prefix of `tokens`, at most `limit` of them. known: a node on their path, to begin at."""
        node, size = known or self.root, self.block_size
        start = node.depth * size
        best = Match(0, self.root)
        while start < limit:
            piece = tuple(tokens[start : min(start + size, limit)])
            full = node.children.get(piece) if len(piece) == size else None
            # Of a recurrent model, a neighbour that parts from it later may have the deeper checkpoint.
            children = [full] if full is not None and not self.recurrent else node.children.values()
            for child in children:
                best = self._deeper(best, node, child, start, _common(child.tokens, piece))
            if full is None:
                break
            node, start = full, start + size
        return best

    def _deeper(self, best: Match, node: Node, child: Node, start: int, common: int) -> Match:
        """The better of `best` and what `child` offers, of whose tokens the first `common` match."""
        checkpoint = None
        if self.recurrent:
            offset = max((place for place in child.checkpoints if place <= common), default=0)
            checkpoint = child.checkpoints.get(offset)
        else:
            offset = common
        if offset == 0 or start + offset <= best.length:
            return best
        if offset == self.block_size:
            return Match(start + offset, child, None, checkpoint)
        return Match(start + offset, node, child, checkpoint)

    # --- paths of running requests ---

    def acquire(self, node: Node) -> list[int]:
        """Protect the path to `node` and count it as used now; its blocks, from the root on."""
        path = list(_path(node))
        self._clock += 1
        for step in path:
            self._unused -= step.users == 0
            step.users += 1
            step.used = self._clock
        return [step.block for step in reversed(path)]

    def release(self, node: Node) -> None:
        """Undo `acquire`: the path stays cached until its blocks are wanted."""
        self._clock += 1
        for step in _path(node):
            step.users -= 1
            step.used = self._clock
            self._unused += step.users == 0
        self._offer(node)

    def extend(self, node: Node, tokens: tuple[int, ...], block: int, checkpoints: dict[int, Checkpoint]) -> Node:
        """Pass a full block to the tree, as the next on an acquired path; its node, now acquired too.

        checkpoints: those within the block, by place. If the prefix is there already, `block` is freed and
        the request goes on with that node's block.
        """
        child = node.children.get(tokens)
        if child is None:
            child = self._insert(node, tokens, block)
        else:
            self.blocks.give_back([block])
        self._unused -= child.users == 0
        child.users += 1
        child.used = self._clock
        self.adopt(child, checkpoints)
        return child

    def leave(self, node: Node, tokens: tuple[int, ...], block: int, checkpoints: dict[int, Checkpoint]) -> None:
        """Pass a block that is not full to the tree, below an acquired `node`."""
        for child in node.children.values():
            if child.tokens[: len(tokens)] == tokens:  # nothing new but, perhaps, its checkpoints
                self.blocks.give_back([block])
                self.adopt(child, checkpoints)
                return
        self._clock += 1
        leaf = self._insert(node, tokens, block)
        leaf.used = self._clock
        self.adopt(leaf, checkpoints)
        self._offer(leaf)

    def forget(self, node: Node) -> None:
        """Free the path to `node`, from its end up to where others use it too or go on from it."""
        while node.parent is not None and node.users == 0 and not node.children:
            self._free(node)
            node = node.parent

    def _insert(self, parent: Node, tokens: tuple[int, ...], block: int) -> Node:
        child = Node(parent, tokens, block, parent.depth + 1)
        shorter = [each for each in parent.children.values() if each.tokens == tokens[: len(each.tokens)]]
        parent.children[tokens] = child
        if self.inserted is not None:
            self.inserted.append(child)
        self._nodes += 1
        self._unused += 1
        for each in shorter:  # leaves that were not full: the new one says all they did
            self.adopt(child, each.checkpoints)
            if each.users == 0:
                self._free(each)
        return child

    # --- blocks ---

    def take_blocks(self, count: int) -> list[int]:
        """`count` blocks for a request. Raises ValueError if fewer are available."""
        while self.blocks.free < count and self._evict_block():
            pass
        return self.blocks.take(count)

    def _offer(self, node: Node) -> None:
        """Put a node on the heap if it may be freed now."""
        if node.parent is None or node.users or node.children or not node.alive:
            return
        self._entries += 1
        heapq.heappush(self._leaves, (node.used, self._entries, node))
        if len(self._leaves) > 4 * self.blocks.size + 64:
            self._leaves = [entry for entry in self._leaves if _current(entry)]
            heapq.heapify(self._leaves)

    def _evict_block(self) -> bool:
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if _current(entry):
                self.evictions += 1
                self._free(entry[2])
                return True
        return False

    def _free(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens]
        node.alive = False
        self._nodes -= 1
        self._unused -= 1
        self.blocks.give_back([node.block])
        for checkpoint in list(node.checkpoints.values()):
            self.drop(checkpoint)
        self._offer(node.parent)

    # --- recurrent states ---

    def take_slot(self, *, lasting: bool) -> int | None:
        """A slot for a request or a lasting checkpoint, or else for one at a chunk boundary, which displaces
        none but its like. None if there is none to be had."""
        if not self.slots.free:
            others = (each for each in self._checkpoints if lasting or not each.lasting)
            oldest = min(others, key=lambda each: (each.lasting, each.used), default=None)
            if oldest is None:
                return None
            self.drop(oldest)
        return self.slots.take(1)[0]

    def keep(self, slot: int, position: int, home: dict[int, Checkpoint], *, lasting: bool) -> Checkpoint:
        """Pass a slot to a checkpoint of the state after `position` tokens, held in `home` under `position`."""
        self._clock += 1
        checkpoint = Checkpoint(slot, position, lasting, home, position, self._clock)
        home[position] = checkpoint
        self._checkpoints[checkpoint] = None
        return checkpoint

    def touch(self, checkpoint: Checkpoint) -> None:
        """Count a checkpoint as used now."""
        self._clock += 1
        checkpoint.used = self._clock

    def drop(self, checkpoint: Checkpoint) -> None:
        """Free a checkpoint."""
        del checkpoint.home[checkpoint.place]
        del self._checkpoints[checkpoint]
        self.slots.give_back([checkpoint.slot])

    def adopt(self, node: Node, checkpoints: dict[int, Checkpoint]) -> None:
        """Move checkpoints to a node; where it has one, theirs is freed."""
        start = (node.depth - 1) * self.block_size
        for checkpoint in list(checkpoints.values()):
            place = checkpoint.position - start
            if (present := node.checkpoints.get(place)) is not None:
                present.lasting |= checkpoint.lasting
                self.drop(checkpoint)
                continue
            del checkpoint.home[checkpoint.place]
            checkpoint.home, checkpoint.place, checkpoint.node = node.checkpoints, place, node
            if self.inserted is not None and checkpoint.lasting:
                self.inserted.append(checkpoint)
            node.checkpoints[place] = checkpoint

    # --- invariants ---

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def check(self) -> None:
        """Raise RuntimeError if the tree contradicts itself or the pools. For when nothing runs."""
        nodes = list(self.nodes())
        cached = sorted(node.block for node in nodes)
        kept = sorted(checkpoint.slot for node in nodes for checkpoint in node.checkpoints.values())
        problems = []
        if cached != sorted(self.blocks.held()):
            problems.append(f"blocks {sorted(self.blocks.held() - set(cached))} are held by nobody")
        if kept != sorted(self.slots.held()) or len(kept) != len(self._checkpoints):
            problems.append(f"slots {sorted(self.slots.held() - set(kept))} are held by nobody")
        if len(nodes) != self._nodes or self._nodes != self._unused or any(node.users for node in nodes):
            problems.append(f"{len(nodes)} nodes, {self._nodes} counted, {self._unused} unused")
        if problems:
            raise RuntimeError("the cache leaks: " + "; ".join(problems))


def _path(node: Node) -> Iterator[Node]:
    """From a node up to the root, without it."""
    while node.parent is not None:
        yield node
        node = node.parent


def _current(entry: tuple[int, int, Node]) -> bool:
    used, _, node = entry
    return node.alive and not node.users and not node.children and node.used == used


def _common(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    """How many leading tokens are equal."""
    for place, (left, right) in enumerate(zip(one, two, strict=False)):
        if left != right:
            return place
    return min(len(one), len(two))
