//! The daemon's side of the ring: find what is committed, pass what is not, give up what its dead owner left,
//! release in order. Worker thread only.
//!
//! Nothing in the ring is trusted. A slot's header is copied once and the copy checked; the walk goes by the
//! state words of the slots themselves, and the shared head is only asked whether a word that says nothing
//! ought to say something. What makes no sense is skipped slot by slot up to the next word that does: interior
//! words of a span are free, so the next record is found even where a span's length was scribbled over.

const std = @import("std");
const assert = std.debug.assert;
const ring = @import("../format/ring.zig");
const shared = @import("../format/shared.zig");
const os = @import("os.zig");
const ring_memory = @import("ring_memory.zig");
const Counters = @import("counters.zig").Counters;

/// One committed operation. `header` is the daemon's own, checked copy.
pub const Item = struct {
    position: u64,
    header: ring.SlotHeader,
    owner: u32,
};

/// Why a slot was skipped, for the event.
pub const Damage = struct {
    position: u64,
    owner: u32,
    reason: []const u8,
};

pub const no_route: u16 = std.math.maxInt(u16);

const Span = struct {
    state: enum { unseen, consumed, skipped, passed },
    /// A consumed span whose release waits for `settle`.
    settling: bool,
    /// The tail has gone on without it (see ring.StateWord). It keeps this entry, and its slots are no others' until it
    /// is done.
    left: bool = false,
    /// Its owner waits for its release: it committed after it was passed.
    awaited: bool = false,
    slots: u16,
    route: u16,

    const unseen = Span{ .state = .unseen, .settling = false, .slots = 0, .route = no_route };

    /// Nothing keeps it from being released.
    fn isDone(span: Span) bool {
        return switch (span.state) {
            .unseen => unreachable,
            .passed => false,
            .consumed => !span.settling,
            .skipped => true,
        };
    }
};

/// Slots that may be left behind: the others must have room for the longest operation.
const left_slots_max = ring.slot_count / 4 * 3;

pub const Consumer = struct {
    view: ring.View,
    counters: *Counters,
    /// All below is released; the word in the ring follows.
    tail: u64,
    /// All below is seen: consumed, skipped or passed.
    scan: u64,
    spans: [ring.slot_count]Span,
    passed: [ring.slot_count]u64,
    passed_count: u32,
    /// Where spans begin that are left behind.
    left: [ring.slot_count]u64,
    left_count: u32,
    left_slots: u32,
    /// Spans whose owners wait for their release.
    awaited_count: u32,
    /// Slots that are not to be had in the lap in which the head comes there next: a span that was left behind is done.
    holes: std.StaticBitSet(ring.slot_count),
    hole_count: u32,
    /// Committed operations that a daemon before had left behind: they come before all others.
    inherited: [ring.slot_count]u64,
    inherited_count: u32,
    inherited_taken: u32,
    /// Slots per route that are consumed and not released.
    held_slots: [1024]u32,
    /// Routes that hold any.
    holding_routes: u32,
    damage: ?Damage,
    /// Below it open claims are passed also where nothing stands behind them: somebody waits until all is seen.
    required_scan: u64 = 0,
    /// What is consumed and held at the tail is left behind with the next release: somebody waits for the tail.
    leave_held: bool = false,
    /// Claims that are open are no reason to stay: nobody comes here any more before another daemon, or this one when
    /// the ring is handed back, takes over what their owners may have committed by then.
    leave_open: bool = false,

    pub fn init(view: ring.View, counters: *Counters) Consumer {
        var tail = shared.load(u64, &view.header().tail, .acquire);
        const head = shared.load(u64, &view.header().head, .acquire);
        // The daemon before may have been killed between freeing words and moving the tail.
        const first = tail;
        while (tail < head and tail < first +| ring.slot_count) {
            const word = view.loadState(tail);
            if (word.lap < ring.lapOf(tail) and isLeft(word, ring.slotIndex(tail))) {
                tail += word.span;
            } else if (word.lap == ring.lapOf(tail) + 1 and word.state == .free) {
                tail += 1;
            } else break;
        }
        // Producers wait for this very word where the ring was full.
        shared.store(u64, &view.header().tail, tail, .seq_cst);
        var consumer = Consumer{
            .view = view,
            .counters = counters,
            .tail = tail,
            .scan = tail,
            .spans = @splat(.unseen),
            .passed = undefined,
            .passed_count = 0,
            .left = undefined,
            .left_count = 0,
            .left_slots = 0,
            .awaited_count = 0,
            .holes = .initEmpty(),
            .hole_count = 0,
            .inherited = undefined,
            .inherited_count = 0,
            .inherited_taken = 0,
            .held_slots = @splat(0),
            .holding_routes = 0,
            .damage = null,
        };
        consumer.inheritLeft();
        consumer.inheritHoles();
        return consumer;
    }

    fn inheritHoles(consumer: *Consumer) void {
        var next_visit = consumer.tail;
        while (next_visit < consumer.tail + ring.slot_count) {
            const index = ring.slotIndex(next_visit);
            const word = consumer.view.loadState(next_visit);
            if (consumer.spans[index].left) {
                next_visit += consumer.spans[index].slots;
            } else if (word.lap == ring.lapOf(next_visit) and word.state != .free) {
                // Of a span whose release was cut short, the last words may be free already.
                next_visit += std.math.clamp(word.span, 1, ring.span_slots_max);
            } else {
                if (word == ring.StateWord.free(ring.lapOf(next_visit) + 1)) {
                    consumer.holes.set(index);
                    consumer.hole_count += 1;
                }
                next_visit += 1;
            }
        }
    }

    fn isLeft(word: ring.StateWord, index: u32) bool {
        return switch (word.state) {
            .passed, .committed, .committed_passed => word.span >= 1 and word.span <= ring.span_slots_max and index + word.span <= ring.slot_count,
            else => false,
        };
    }

    /// What a daemon before had left behind stands in the words still.
    fn inheritLeft(consumer: *Consumer) void {
        var index: u32 = 0;
        while (index < ring.slot_count) {
            const word = consumer.view.loadState(index);
            const position = @as(u64, word.lap) * ring.slot_count + index;
            const possible = isLeft(word, index) and position < consumer.tail and consumer.left_slots + word.span <= left_slots_max;
            if (!possible) {
                index += 1;
                continue;
            }
            if (word.state == .committed) {
                consumer.spans[index] = .{ .state = .skipped, .settling = true, .slots = word.span, .route = no_route };
                consumer.inherited[consumer.inherited_count] = position;
                consumer.inherited_count += 1;
            } else {
                consumer.spans[index] = .{ .state = .passed, .settling = false, .slots = word.span, .route = no_route };
                consumer.passed[consumer.passed_count] = position;
                consumer.passed_count += 1;
            }
            consumer.leave(position);
            index += word.span;
        }
        std.mem.sort(u64, consumer.inherited[0..consumer.inherited_count], {}, std.sort.asc(u64));
    }

    /// At a start, before rows are given out again: what dead owners left open below `head` is given up while
    /// their rows still tell that they are dead.
    pub fn abortDeadClaims(consumer: *Consumer, head: u64) void {
        var position = consumer.tail;
        // Up to the head itself: an owner may have died before it moved it.
        while (position <= head and position < consumer.tail + ring.slot_count) : (position += 1) {
            const word = consumer.view.loadState(position);
            if (word.lap != ring.lapOf(position)) continue;
            if (word.state == .claimed or word.state == .passed) _ = consumer.abortIfOwnerGone(position, word);
        }
        for (consumer.passed[0..consumer.passed_count]) |left| {
            const word = consumer.view.loadState(left);
            if (word.state == .claimed or word.state == .passed) _ = consumer.abortIfOwnerGone(left, word);
        }
    }

    /// The next committed operation that was not seen before, or null. The caller answers each with `consume`.
    pub fn next(consumer: *Consumer) ?Item {
        const view = consumer.view;
        while (consumer.inherited_taken < consumer.inherited_count) {
            const position = consumer.inherited[consumer.inherited_taken];
            consumer.inherited_taken += 1;
            consumer.spans[ring.slotIndex(position)].settling = false;
            if (consumer.readHeader(position, view.loadState(position))) |item| return item;
        }
        while (consumer.scan - consumer.tail < ring.slot_count) {
            const position = consumer.scan;
            const index = ring.slotIndex(position);
            // Head before word: a word that a claim has changed is seen by who sees the head behind it.
            const head = shared.load(u64, &view.header().head, .acquire);
            const word = view.loadState(position);
            if (head < position or head > consumer.tail + ring.slot_count) consumer.repairHead(head);
            if (consumer.spans[index].left) {
                if (position >= head) return null;
                consumer.scan += consumer.spans[index].slots;
                continue;
            }
            if (consumer.holes.isSet(index)) {
                if (position >= head) return null;
                consumer.holes.unset(index);
                consumer.hole_count -= 1;
                consumer.see(position, 1, .skipped);
                continue;
            }
            const valid = consumer.isPossible(position, word);
            // An owner that died before it moved the head: once the span is released nobody could tell how far.
            if (valid and word.state != .free and head == position) {
                _ = shared.exchangeIf(u64, &view.header().head, position, position + word.span, .acq_rel, .monotonic);
            }
            switch (if (valid) word.state else .free) {
                .padding, .aborted => consumer.see(position, word.span, .skipped),
                .committed => {
                    if (consumer.checked(position, word)) |item| return item;
                },
                .claimed => {
                    if (consumer.abortIfOwnerGone(position, word)) continue;
                    if (!consumer.somethingBehind(position, word)) return null;
                    const passed = word.with(.passed).bits();
                    if (shared.exchangeIf(u64, view.stateWord(position), word.bits(), passed, .acq_rel, .acquire) != null) continue;
                    consumer.pass(position, word);
                    consumer.counters.add(.claims_passed_total, 1);
                },
                // Passed in an earlier daemon's life: what stands behind it may have its place in the file already.
                .passed => {
                    if (consumer.abortIfOwnerGone(position, word)) continue;
                    consumer.pass(position, word);
                },
                .committed_passed => consumer.pass(position, word),
                .free, _ => {
                    if (position >= head or head > consumer.tail + ring.slot_count) return null;
                    const owner = if (word.state == .free) ring.producer_rows else word.owner;
                    consumer.skipDamaged(position, owner, "its state word makes no sense");
                },
            }
        }
        return null;
    }

    /// What the word says can be true.
    fn isPossible(consumer: *const Consumer, position: u64, word: ring.StateWord) bool {
        return word.lap == ring.lapOf(position) and word.span >= 1 and word.span <= ring.span_slots_max and
            ring.slotIndex(position) + word.span <= ring.slot_count and
            position + word.span <= consumer.tail + ring.slot_count and
            consumer.isClear(position, word.span);
    }

    /// The next operation among the passed claims that has been committed since, or null.
    pub fn nextPassed(consumer: *Consumer) ?Item {
        var i: u32 = 0;
        while (i < consumer.passed_count) {
            const position = consumer.passed[i];
            const word = consumer.view.loadState(position);
            const span = &consumer.spans[ring.slotIndex(position)];
            switch (if (word.lap == ring.lapOf(position)) word.state else .aborted) {
                .passed => if (!consumer.abortIfOwnerGone(position, word)) {
                    i += 1;
                },
                .committed_passed, .committed => {
                    consumer.forgetPassed(i);
                    span.state = .skipped; // unless the caller consumes it
                    span.awaited = true;
                    consumer.awaited_count += 1;
                    if (word.span == span.slots) {
                        if (consumer.readHeader(position, word)) |item| return item;
                    } else consumer.reject(position, word.owner, "its span changed while it was open");
                },
                else => {
                    consumer.forgetPassed(i);
                    span.state = .skipped;
                },
            }
        }
        return null;
    }

    /// The operation that `next` or `nextPassed` gave has been taken over by `route`.
    pub fn consume(consumer: *Consumer, item: *const Item, route: u16) void {
        const span = &consumer.spans[ring.slotIndex(item.position)];
        span.state = .consumed;
        span.route = route;
        if (route == no_route) return;
        if (consumer.held_slots[route] == 0) consumer.holding_routes += 1;
        consumer.held_slots[route] += span.slots;
    }

    /// As `consume`, but not released before `settle`.
    pub fn consumeHeld(consumer: *Consumer, item: *const Item, route: u16) void {
        consumer.consume(item, route);
        _ = consumer.hold(item.position);
    }

    /// A consumed operation that is not released yet: keep it so until `settle`. false: it was held already.
    pub fn hold(consumer: *Consumer, position: u64) bool {
        const span = &consumer.spans[ring.slotIndex(position)];
        assert(position < consumer.scan and (position >= consumer.tail or span.left));
        defer span.settling = true;
        return !span.settling;
    }

    pub fn settle(consumer: *Consumer, position: u64) void {
        consumer.spans[ring.slotIndex(position)].settling = false;
    }

    /// Frees all spans that are done, those left behind and those from the tail on; leaves behind what holds up the
    /// ring. Whether there is more room now; see `wakeProducers`.
    pub fn release(consumer: *Consumer) bool {
        const before = consumer.tail;
        const freed = consumer.releaseLeft();
        while (consumer.tail < consumer.scan) {
            const span = &consumer.spans[ring.slotIndex(consumer.tail)];
            if (span.left) {
                consumer.tail += span.slots;
                continue;
            }
            if (!span.isDone()) {
                const has_room = consumer.left_slots + span.slots <= left_slots_max;
                if (!(consumer.isHeldUp(span) and has_room) and !(consumer.leave_open and span.state == .passed)) break;
                consumer.leave(consumer.tail);
                consumer.counters.add(.spans_left_behind_total, 1);
                // Before anything behind it is freed: a daemon that finds the tail here knows the span by its word.
                consumer.tail += span.slots;
                shared.store(u64, &consumer.view.header().tail, consumer.tail, .seq_cst);
                continue;
            }
            consumer.noLongerHeld(span.*);
            consumer.free(consumer.tail, span.slots, ring.lapOf(consumer.tail) + 1);
            consumer.tail += span.slots;
            span.* = .unseen;
        }
        if (consumer.tail == consumer.scan) consumer.leave_held = false;
        if (consumer.tail == before and !freed) return false;
        shared.store(u64, &consumer.view.header().tail, consumer.tail, .seq_cst);
        return true;
    }

    /// Who waits for space looks again. Behind a release, and behind the publication of what else he looks at: his credit.
    pub fn wakeProducers(consumer: *const Consumer) void {
        const header = consumer.view.header();
        // A full fence: whoever has begun to wait and is not seen here sees all that was stored before.
        _ = @atomicRmw(u32, &header.space_sequence, .Add, 1, .seq_cst);
        if (shared.load(u32, &header.space_waiters, .seq_cst) == 0) return;
        os.futexWake(&header.space_sequence, std.math.maxInt(i32));
    }

    /// `first`, which stands at the tail, keeps others from the ring, or soon will, or from the release that they wait
    /// for.
    fn isHeldUp(consumer: *const Consumer, first: *const Span) bool {
        if ((consumer.leave_held and first.settling) or consumer.awaited_count > @intFromBool(first.awaited)) return true;
        if (consumer.scan - consumer.tail > ring.slot_count / 2) return true;
        return shared.load(u32, &consumer.view.header().space_waiters, .seq_cst) != 0;
    }

    fn leave(consumer: *Consumer, position: u64) void {
        const span = &consumer.spans[ring.slotIndex(position)];
        span.left = true;
        consumer.left[consumer.left_count] = position;
        consumer.left_count += 1;
        consumer.left_slots += span.slots;
    }

    fn releaseLeft(consumer: *Consumer) bool {
        var any = false;
        var i: u32 = 0;
        while (i < consumer.left_count) {
            const position = consumer.left[i];
            const index = ring.slotIndex(position);
            const span = consumer.spans[index];
            if (!span.isDone() or span.settling) {
                i += 1;
                continue;
            }
            any = true;
            consumer.left_count -= 1;
            consumer.left[i] = consumer.left[consumer.left_count];
            consumer.left_slots -= span.slots;
            consumer.noLongerHeld(span);
            // Where the head comes, or came, next: nobody may claim there in that lap, for some may have passed it.
            const next_visit = consumer.tail + (index +% ring.slot_count -% ring.slotIndex(consumer.tail)) % ring.slot_count;
            consumer.free(position, span.slots, ring.lapOf(next_visit) + 1);
            if (next_visit < consumer.scan) {
                consumer.spans[index] = .{ .state = .skipped, .settling = false, .slots = span.slots, .route = no_route };
            } else {
                consumer.spans[index] = .unseen;
                for (0..span.slots) |slot| consumer.holes.set(index + slot);
                consumer.hole_count += span.slots;
            }
        }
        return any;
    }

    fn free(consumer: *Consumer, position: u64, slots: u16, lap: u40) void {
        assert(slots >= 1);
        const word = ring.StateWord.free(lap).bits();
        // The first word last: as long as it stands, a daemon that is killed here finds the span whole.
        var i: u64 = slots;
        while (i > 0) {
            i -= 1;
            shared.store(u64, consumer.view.stateWord(position + i), word, .release);
        }
    }

    fn noLongerHeld(consumer: *Consumer, span: Span) void {
        if (span.awaited) consumer.awaited_count -= 1;
        if (span.state != .consumed or span.route == no_route) return;
        consumer.held_slots[span.route] -= span.slots;
        if (consumer.held_slots[span.route] == 0) consumer.holding_routes -= 1;
    }

    /// No slot of the span belongs to one that is left behind, or to a hole.
    fn isClear(consumer: *const Consumer, position: u64, slots: u16) bool {
        if (consumer.left_count == 0 and consumer.hole_count == 0) return true;
        for (1..slots) |slot| {
            const index = ring.slotIndex(position + slot);
            if (consumer.spans[index].left or consumer.holes.isSet(index)) return false;
        }
        return true;
    }

    /// Whether anything that `next` or `nextPassed` would give may be there. Called after the doorbell is set.
    pub fn somethingToDo(consumer: *Consumer) bool {
        if (consumer.inherited_taken < consumer.inherited_count) return true;
        const position = consumer.pastLeft(consumer.scan);
        const word = consumer.view.loadState(position);
        if (position - consumer.tail < ring.slot_count and word.lap == ring.lapOf(position) and word.state != .free) {
            if (!consumer.isPossible(position, word)) {
                // It is skipped, but only below the head.
                if (position < shared.load(u64, &consumer.view.header().head, .acquire)) return true;
            } else if (word.state != .claimed or consumer.somethingBehind(position, word)) return true;
        }
        for (consumer.passed[0..consumer.passed_count]) |passed| {
            switch (consumer.view.loadState(passed).state) {
                .passed => {},
                else => return true,
            }
        }
        return false;
    }

    pub fn headPosition(consumer: *const Consumer) u64 {
        const head = shared.load(u64, &consumer.view.header().head, .seq_cst);
        // Whatever somebody wrote there: there is no more in a ring than its slots.
        return @max(consumer.tail, @min(head, consumer.tail + ring.slot_count));
    }

    /// All that stood below `position`, the head once, is seen. Where the head is lower by now, that was no position that
    /// anybody had claimed: it was set right, and what the ring has now is all there is.
    pub fn hasSeen(consumer: *const Consumer, position: u64) bool {
        return consumer.scan >= position or consumer.scan >= consumer.headPosition();
    }

    /// The first position from `position` on that somebody could claim.
    fn pastLeft(consumer: *const Consumer, position: u64) u64 {
        var at = position;
        while (at < consumer.tail + ring.slot_count) {
            const index = ring.slotIndex(at);
            if (consumer.spans[index].left) {
                at += consumer.spans[index].slots;
            } else if (consumer.holes.isSet(index)) {
                at += 1;
            } else break;
        }
        return at;
    }

    /// All operations at positions below `position` are seen. Claims that are open still are in no log, whoever may
    /// commit them later.
    pub fn isBehindCommitted(consumer: *const Consumer, position: u64) bool {
        if (!consumer.hasSeen(position) or consumer.inherited_taken < consumer.inherited_count) return false;
        for (consumer.passed[0..consumer.passed_count]) |passed| {
            if (passed < position and consumer.view.loadState(passed).state == .committed_passed) return false;
        }
        return true;
    }

    pub fn takeDamage(consumer: *Consumer) ?Damage {
        defer consumer.damage = null;
        return consumer.damage;
    }

    pub fn reject(consumer: *Consumer, position: u64, owner: u32, reason: []const u8) void {
        consumer.counters.add(.slots_damaged_total, 1);
        consumer.damage = .{ .position = position, .owner = owner, .reason = reason };
    }

    fn see(consumer: *Consumer, position: u64, slots: u16, state: @FieldType(Span, "state")) void {
        assert(position == consumer.scan);
        assert(slots >= 1);
        consumer.spans[ring.slotIndex(position)] = .{ .state = state, .settling = false, .slots = slots, .route = no_route };
        consumer.scan += slots;
    }

    fn checked(consumer: *Consumer, position: u64, word: ring.StateWord) ?Item {
        if (consumer.readHeader(position, word)) |item| {
            consumer.see(position, word.span, .skipped); // unless the caller consumes it
            return item;
        }
        // One slot only: if the span was false, the true next record is found this way.
        consumer.see(position, 1, .skipped);
        return null;
    }

    fn readHeader(consumer: *Consumer, position: u64, word: ring.StateWord) ?Item {
        const in_ring: *const volatile ring.SlotHeader = consumer.view.slotHeader(position);
        const header: ring.SlotHeader = in_ring.*;
        const reason = reason: {
            if (header.computeChecksum() != header.header_checksum) break :reason "its header checksum is wrong";
            if (header.position != position) break :reason "its header belongs to another position";
            if (header.length_bytes > ring.payload_bytes_max) break :reason "its length is above the limit";
            if (ring.spanForLength(header.length_bytes) != word.span) break :reason "its length does not fit its span";
            return .{ .position = position, .header = header, .owner = word.owner };
        };
        consumer.reject(position, word.owner, reason);
        return null;
    }

    fn skipDamaged(consumer: *Consumer, position: u64, owner: u32, reason: []const u8) void {
        // Where a false span is skipped, each of its interior slots comes by here: one count for the run.
        const continues = position > consumer.tail and consumer.spans[ring.slotIndex(position - 1)].state == .skipped;
        if (!continues) consumer.reject(position, owner, reason);
        consumer.see(position, 1, .skipped);
    }

    fn pass(consumer: *Consumer, position: u64, word: ring.StateWord) void {
        // A false span must not swallow what stands behind the true one.
        var slots: u16 = 1;
        while (slots < word.span) : (slots += 1) {
            if (consumer.view.loadState(position + slots).state != .free) break;
        }
        consumer.passed[consumer.passed_count] = position;
        consumer.passed_count += 1;
        consumer.see(position, slots, .passed);
    }

    fn forgetPassed(consumer: *Consumer, index: u32) void {
        consumer.passed_count -= 1;
        consumer.passed[index] = consumer.passed[consumer.passed_count];
    }

    fn abortIfOwnerGone(consumer: *Consumer, position: u64, word: ring.StateWord) bool {
        if (word.owner < ring.producer_rows and
            ring_memory.ownerOf(consumer.view.producerRow(word.owner)) == .living) return false;
        const aborted = word.with(.aborted).bits();
        if (shared.exchangeIf(u64, consumer.view.stateWord(position), word.bits(), aborted, .acq_rel, .acquire) == null) {
            consumer.counters.add(.claims_aborted_total, 1);
        }
        return true; // look again: aborted now, or committed in the last moment
    }

    fn somethingBehind(consumer: *const Consumer, position: u64, word: ring.StateWord) bool {
        // Who waits for space may wait for the slots that this very claim holds up.
        if (shared.load(u32, &consumer.view.header().space_waiters, .seq_cst) != 0) return true;
        if (position < consumer.required_scan) return true;
        const behind = consumer.pastLeft(position + word.span);
        if (behind >= consumer.tail + ring.slot_count) return true; // the ring is full of claims: all are passed
        const other = consumer.view.loadState(behind);
        return other.lap == ring.lapOf(behind) and other.state != .free;
    }

    /// A head that cannot be: set it behind the last claim that the words show.
    fn repairHead(consumer: *Consumer, seen: u64) void {
        var position = consumer.scan;
        while (position < consumer.tail + ring.slot_count) {
            const past = consumer.pastLeft(position);
            if (past != position) {
                // Only if there is something behind.
                const next_word = consumer.view.loadState(past);
                if (past >= consumer.tail + ring.slot_count or next_word.lap != ring.lapOf(past) or next_word.state == .free) break;
                position = past;
            }
            const word = consumer.view.loadState(position);
            if (word.lap != ring.lapOf(position) or word.state == .free) break;
            position += @max(1, word.span);
        }
        if (seen == position) return;
        if (shared.exchangeIf(u64, &consumer.view.header().head, seen, position, .acq_rel, .acquire) == null) {
            consumer.counters.add(.heads_repaired_total, 1);
            consumer.reject(consumer.scan, 0, "the ring's head pointed outside the ring; it was set right");
        }
    }
};

// ---- tests: a ring in plain memory, and a producer that does exactly what each test says ----------------

const testing = std.testing;

const TestRing = struct {
    memory: []align(std.heap.page_size_min) u8,
    counters: *Counters,
    consumer: *Consumer,

    fn init() !TestRing {
        const memory = try testing.allocator.alignedAlloc(u8, .fromByteUnits(std.heap.page_size_min), ring.file_size);
        @memset(memory[0..ring.slots_offset], 0);
        const counters = try testing.allocator.create(Counters);
        counters.* = .{};
        const consumer = try testing.allocator.create(Consumer);
        consumer.* = Consumer.init(.{ .memory = memory }, counters);
        return .{ .memory = memory, .counters = counters, .consumer = consumer };
    }

    fn deinit(self: TestRing) void {
        testing.allocator.destroy(self.consumer);
        testing.allocator.destroy(self.counters);
        testing.allocator.free(self.memory);
    }

    fn view(self: TestRing) ring.View {
        return .{ .memory = self.memory };
    }

    /// Claims at the head; row 1 is a living thread's, row 2 a dead one's.
    fn claim(self: TestRing, owner: u11, length_bytes: u32) u64 {
        const rows = self.view();
        @as(*u32, @ptrCast(&rows.producerRow(1).mutex)).* = 4711;
        @as(*u32, @ptrCast(&rows.producerRow(2).mutex)).* = 4712 | ring.mutex_owner_died;
        const head = &self.view().header().head;
        const span: u9 = @intCast(ring.spanForLength(length_bytes));
        const position = head.*;
        const word = ring.StateWord{ .state = .claimed, .span = span, .owner = owner, .lap = ring.lapOf(position) };
        self.view().stateWord(position).* = word.bits();
        head.* += span;
        var header = std.mem.zeroes(ring.SlotHeader);
        header.position = position;
        header.length_bytes = length_bytes;
        header.operation = @intFromEnum(ring.Operation.append);
        header.header_checksum = header.computeChecksum();
        self.view().slotHeader(position).* = header;
        return position;
    }

    fn set(self: TestRing, position: u64, state: ring.State) void {
        self.view().stateWord(position).* = self.view().loadState(position).with(state).bits();
    }

    fn commit(self: TestRing, length_bytes: u32) u64 {
        const position = self.claim(1, length_bytes);
        self.set(position, .committed);
        return position;
    }

    fn expectNext(self: TestRing, position: u64) !void {
        const item = self.consumer.next() orelse return error.NothingThere;
        try testing.expectEqual(position, item.position);
        self.consumer.consume(&item, 0);
    }
};

test "committed operations come in order, once, and are released for the next lap" {
    const t = try TestRing.init();
    defer t.deinit();
    // Five laps of spans of changing length; where one would cross the end, padding.
    var produced: u64 = 0;
    var length: u32 = 1;
    while (t.view().header().head < 5 * ring.slot_count) : (length = (length * 7 + 501) % 100_000) {
        const left = ring.slot_count - ring.slotIndex(t.view().header().head);
        if (ring.spanForLength(length) > left) {
            const position = t.view().header().head;
            t.view().stateWord(position).* = (ring.StateWord{ .state = .padding, .span = @intCast(left), .owner = 1, .lap = ring.lapOf(position) }).bits();
            t.view().header().head += left;
        }
        const position = t.commit(length);
        produced += 1;
        try t.expectNext(position);
        try testing.expectEqual(null, t.consumer.next());
        _ = t.consumer.release();
        try testing.expectEqual(t.view().header().head, t.consumer.tail);
        try testing.expectEqual(t.consumer.tail, t.view().header().tail);
        try testing.expectEqual(@as(u32, 0), t.consumer.held_slots[0]);
    }
    try testing.expectEqual(@as(u64, 0), t.counters.get(.slots_damaged_total));
}

test "an open claim is passed when something stands behind it, and holds up the release alone" {
    const t = try TestRing.init();
    defer t.deinit();
    const open = t.claim(1, 100);
    try testing.expectEqual(null, t.consumer.next()); // nothing behind it: waited for
    const behind = t.commit(100);
    try t.expectNext(behind);
    try testing.expectEqual(ring.State.passed, t.view().loadState(open).state);
    _ = t.consumer.release();
    try testing.expectEqual(@as(u64, 0), t.consumer.tail);
    try testing.expect(t.consumer.isBehindCommitted(open + 1));
    t.set(open, .committed_passed);
    const item = t.consumer.nextPassed().?;
    try testing.expectEqual(open, item.position);
    t.consumer.consumeHeld(&item, 0);
    _ = t.consumer.release();
    try testing.expectEqual(@as(u64, 0), t.consumer.tail); // its owner waits for the release: not before it is applied
    t.consumer.settle(open);
    _ = t.consumer.release();
    try testing.expectEqual(@as(u64, 2), t.consumer.tail);
}

test "a claim whose owner is dead is given up, passed or not" {
    const t = try TestRing.init();
    defer t.deinit();
    const dead = t.claim(2, 5000);
    const behind = t.commit(10);
    try t.expectNext(behind);
    try testing.expectEqual(ring.State.aborted, t.view().loadState(dead).state);
    _ = t.consumer.release();
    try testing.expectEqual(behind + 1, t.consumer.tail);
    try testing.expectEqual(@as(u64, 1), t.counters.get(.claims_aborted_total));

    const living = t.claim(1, 10);
    const last = t.commit(10);
    try t.expectNext(last);
    @as(*u32, @ptrCast(&t.view().producerRow(1).mutex)).* |= ring.mutex_owner_died;
    try testing.expectEqual(null, t.consumer.nextPassed());
    try testing.expectEqual(ring.State.aborted, t.view().loadState(living).state);
    _ = t.consumer.release();
    try testing.expectEqual(last + 1, t.consumer.tail);
}

test "an owner that died before it moved the head does not leave the head behind" {
    const t = try TestRing.init();
    defer t.deinit();
    const dead = t.claim(2, 5000);
    t.view().header().head = dead;
    try testing.expectEqual(null, t.consumer.next());
    try testing.expectEqual(dead + 2, t.view().header().head);
    try t.expectNext(t.commit(1));
}

test "whatever is scribbled over one slot, the records around it come out" {
    var seed: u64 = 0;
    while (seed < 400) : (seed += 1) {
        errdefer std.debug.print("seed {d}\n", .{seed});
        var prng = std.Random.DefaultPrng.init(seed);
        const random = prng.random();
        const t = try TestRing.init();
        defer t.deinit();
        var places: [12]u64 = undefined;
        for (&places) |*place| place.* = t.commit(random.uintLessThan(u32, 20_000));
        const victim = places[random.uintLessThan(usize, places.len)];
        const word: [*]u8 = @ptrCast(t.view().stateWord(victim));
        const header: [*]u8 = @ptrCast(t.view().slotHeader(victim));
        switch (random.uintLessThan(u32, 3)) {
            0 => random.bytes(word[0..8]),
            1 => header[random.uintLessThan(usize, 56)] +%= random.intRangeAtMost(u8, 1, 255),
            2 => { // a false span
                var changed = t.view().loadState(victim);
                changed.span = random.int(u9);
                t.view().stateWord(victim).* = changed.bits();
            },
            else => unreachable,
        }
        var found: usize = 0;
        var victim_found = false;
        for (0..ring.slot_count) |_| {
            const item = t.consumer.next() orelse t.consumer.nextPassed() orelse break;
            t.consumer.consume(&item, 0);
            if (item.position == victim) victim_found = true else found += 1;
        }
        try testing.expectEqual(places.len - 1, found);
        if (!victim_found) try testing.expect(t.counters.get(.slots_damaged_total) > 0 or t.consumer.passed_count > 0 or t.counters.get(.claims_aborted_total) > 0 or t.view().loadState(victim).state == .padding or t.view().loadState(victim).state == .aborted);
    }
}

test "a head that points anywhere is set right" {
    const t = try TestRing.init();
    defer t.deinit();
    const first = t.commit(10);
    for ([_]u64{ std.math.maxInt(u64), 5 * ring.slot_count, 0 }) |nonsense| {
        const true_head = t.view().header().head;
        if (nonsense == true_head) continue;
        t.view().header().head = nonsense;
        while (t.consumer.next()) |item| t.consumer.consume(&item, 0);
        try testing.expectEqual(true_head, t.view().header().head);
    }
    _ = first;
    try t.expectNext(t.commit(10));
}

test "who waits for a head that never was is not kept waiting once it is set right" {
    const t = try TestRing.init();
    defer t.deinit();
    try t.expectNext(t.commit(10));
    const true_head = t.view().header().head;
    t.view().header().head = std.math.maxInt(u64);
    const wanted = t.consumer.headPosition();
    try testing.expectEqual(ring.slot_count, wanted);
    try testing.expect(!t.consumer.hasSeen(wanted));
    try testing.expectEqual(null, t.consumer.next());
    try testing.expectEqual(true_head, t.view().header().head);
    try testing.expect(t.consumer.hasSeen(wanted));
    // Of an honest ring, whose head only grows, nothing is taken for seen that is not.
    const last = t.commit(10);
    try testing.expect(!t.consumer.hasSeen(last + 1));
    try t.expectNext(last);
    try testing.expect(t.consumer.hasSeen(last + 1));
}

test "a word that makes no sense is nothing to stay awake for, unless the head is past it" {
    const t = try TestRing.init();
    defer t.deinit();
    for ([_]u64{ 9, 3, 1 }) |state| {
        t.view().stateWord(0).* = state; // a span of no slots
        try testing.expectEqual(null, t.consumer.next());
        try testing.expect(!t.consumer.somethingToDo());
    }
    t.view().header().head = 1;
    try testing.expect(t.consumer.somethingToDo());
    try testing.expectEqual(null, t.consumer.next());
    try testing.expect(!t.consumer.somethingToDo());
    try testing.expect(t.counters.get(.slots_damaged_total) > 0);
}

test "where nobody comes any more, open claims of the living hold up nothing" {
    const t = try TestRing.init();
    defer t.deinit();
    const open = t.claim(1, 100);
    try t.expectNext(t.commit(100));
    _ = t.consumer.release();
    try testing.expectEqual(open, t.consumer.tail);
    t.consumer.leave_open = true;
    _ = t.consumer.release();
    try testing.expectEqual(t.consumer.scan, t.consumer.tail);
    // Whoever takes the ring over finds what its owner has committed since.
    t.set(open, .committed_passed);
    const again = try testing.allocator.create(Consumer);
    defer testing.allocator.destroy(again);
    var counters = Counters{};
    again.* = Consumer.init(t.view(), &counters);
    try testing.expectEqual(open, again.nextPassed().?.position);
}

test "a daemon that was killed between freeing words and moving the tail is continued" {
    const t = try TestRing.init();
    defer t.deinit();
    _ = t.commit(10);
    _ = t.commit(9000);
    const kept = t.commit(10);
    while (t.consumer.next()) |item| t.consumer.consume(&item, 0);
    _ = t.consumer.release();
    t.view().header().tail = 0; // the store that did not happen
    t.view().stateWord(kept).* = (ring.StateWord{ .state = .committed, .span = 1, .owner = 1, .lap = 0 }).bits();
    var counters = Counters{};
    const again = try testing.allocator.create(Consumer);
    defer testing.allocator.destroy(again);
    again.* = Consumer.init(t.view(), &counters);
    try testing.expectEqual(kept, again.next().?.position);
}
