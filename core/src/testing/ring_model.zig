//! The ring's protocol, explored exhaustively in small: every interleaving of the atomic steps of a few producers
//! and the worker, with a producer dying at any step. A model of client/producer.zig and of the worker's walk,
//! with four slots and spans of one and two; a step here is one access to shared memory there.
//!
//! What is asserted in every state: whoever copies owns all slots that he copies into; the worker takes only whole
//! records, each once, each producer's in order; head and tail never cross. In every state where nobody can step:
//! everybody is done, and everything that was committed has been taken and released.

const std = @import("std");
const assert = std.debug.assert;

const slots = 4;
const span_max = 2;

const WordState = enum(u8) { free, claimed, passed, committed, committed_passed, padding, aborted };

const Word = extern struct {
    state: WordState = .free,
    span: u8 = 0,
    owner: u8 = 0,
    lap: u8 = 0,

    fn with(word: Word, state: WordState) Word {
        var changed = word;
        changed.state = state;
        return changed;
    }

    fn equals(a: Word, b: Word) bool {
        return std.meta.eql(a, b);
    }
};

const nobody = 0xff;

const Step = enum(u8) { load_head, load_tail, claim, help, move_head, copy, commit, commit_passed, await_release, done, dead };

const Producer = extern struct {
    step: Step = .load_head,
    /// Index of the operation that it is at.
    operation: u8 = 0,
    head: u8 = 0,
    wanted: u8 = 0,
    padding: bool = false,
    found_span: u8 = 0,
    copied: u8 = 0,
};

const Look = enum(u8) { idle, scan_head, scan_act, passed_act, free_words, move_tail };

const Worker = extern struct {
    look: Look = .idle,
    scan: u8 = 0,
    seen: Word = .{},
    index: u8 = 0,
    passed: [slots]u8 = @splat(0),
    passed_count: u8 = 0,
    span: [slots]u8 = @splat(0),
    finished: [slots]bool = @splat(false),
};

/// Who wrote a slot's payload last.
const Content = extern struct { owner: u8 = nobody, position: u8 = 0 };

fn Model(comptime spans: []const []const u8) type {
    return struct {
        const producers = spans.len;

        const State = extern struct {
            head: u8 = 0,
            tail: u8 = 0,
            words: [slots]Word = @splat(.{}),
            content: [slots]Content = @splat(.{}),
            producers: [producers]Producer = @splat(.{}),
            worker: Worker = .{},
            /// Operations of each producer that the worker has taken.
            taken: [producers]u8 = @splat(0),
            deaths_left: u8,
        };

        const Explorer = struct {
            visited: std.AutoHashMap([@sizeOf(State)]u8, void),
            pending: std.ArrayListUnmanaged(State) = .empty,
            final_states: u64 = 0,

            fn add(explorer: *Explorer, state: *const State) !void {
                check(state);
                const entry = try explorer.visited.getOrPut(std.mem.asBytes(state).*);
                if (!entry.found_existing) try explorer.pending.append(explorer.visited.allocator, state.*);
            }
        };

        fn check(state: *const State) void {
            assert(state.tail <= state.worker.scan);
            assert(state.head <= state.tail + slots);
            // Open claims do not overlap.
            var owner: [slots]u8 = @splat(nobody);
            for (&state.producers, 0..) |*producer, who| {
                const open = switch (producer.step) {
                    .move_head => !producer.padding,
                    .copy, .commit, .commit_passed => true,
                    else => false,
                };
                if (!open) continue;
                for (producer.head..producer.head + producer.wanted) |position| {
                    assert(owner[position % slots] == nobody);
                    owner[position % slots] = @intCast(who);
                }
            }
        }

        fn stepProducer(state: *State, who: usize) void {
            const producer = &state.producers[who];
            const word = &state.words[producer.head % slots];
            const mine = Word{ .state = if (producer.padding) .padding else .claimed, .span = producer.wanted, .owner = @intCast(who), .lap = producer.head / slots };
            switch (producer.step) {
                .load_head => {
                    producer.head = state.head;
                    producer.step = .load_tail;
                },
                .load_tail => {
                    const span = spans[who][producer.operation];
                    const left = slots - producer.head % slots;
                    producer.padding = left < span;
                    producer.wanted = if (producer.padding) left else span;
                    producer.step = if (producer.head + producer.wanted > state.tail + slots) .load_head else .claim;
                },
                .claim => {
                    if (word.equals(.{ .lap = producer.head / slots })) {
                        word.* = mine;
                        producer.step = .move_head;
                    } else if (word.lap != producer.head / slots) {
                        producer.step = .load_head;
                    } else {
                        assert(word.state != .free);
                        producer.found_span = word.span;
                        producer.step = .help;
                    }
                },
                .help => {
                    if (state.head == producer.head) state.head += producer.found_span;
                    producer.step = .load_head;
                },
                .move_head => {
                    if (state.head == producer.head) state.head += producer.wanted;
                    producer.step = if (producer.padding) .load_head else .copy;
                },
                .copy => {
                    // The slot must be this claim's, and nobody's record that is still wanted.
                    const first = state.words[producer.head % slots];
                    assert(first.owner == who and first.lap == producer.head / slots);
                    state.content[(producer.head + producer.copied) % slots] = .{ .owner = @intCast(who), .position = producer.head };
                    producer.copied += 1;
                    if (producer.copied == producer.wanted) producer.step = .commit;
                },
                .commit => {
                    if (word.equals(mine)) {
                        word.state = .committed;
                        finish(producer, who, false);
                    } else {
                        assert(word.equals(mine.with(.passed))); // nobody aborts the living
                        producer.step = .commit_passed;
                    }
                },
                .commit_passed => {
                    assert(word.equals(mine.with(.passed)));
                    word.state = .committed_passed;
                    finish(producer, who, true);
                },
                .await_release => {
                    if (word.lap != producer.head / slots) nextOperation(producer, who);
                },
                .done, .dead => unreachable,
            }
            if (producer.step == .load_head or producer.step == .done) forgetLocals(producer);
        }

        /// So that states which differ in leftovers only are one.
        fn forgetLocals(producer: *Producer) void {
            producer.* = .{ .step = producer.step, .operation = producer.operation };
        }

        fn finish(producer: *Producer, who: usize, passed: bool) void {
            if (passed) producer.step = .await_release else nextOperation(producer, who);
        }

        fn nextOperation(producer: *Producer, who: usize) void {
            producer.operation += 1;
            producer.step = if (producer.operation == spans[who].len) .done else .load_head;
        }

        fn take(state: *State, position: u8, word: Word) void {
            for (position..position + word.span) |at| {
                const content = state.content[at % slots];
                assert(content.owner == word.owner and content.position == position);
            }
            const number = state.taken[word.owner];
            assert(spans[word.owner][number] == word.span); // in order: spans of one producer differ
            state.taken[word.owner] += 1;
        }

        fn see(worker: *Worker, word: Word, finished: bool) void {
            worker.span[worker.scan % slots] = word.span;
            worker.finished[worker.scan % slots] = finished;
            worker.scan += word.span;
        }

        fn rest(worker: *Worker) void {
            worker.look = .idle;
            worker.seen = .{};
            worker.index = 0;
        }

        /// Each of the things that the worker may do next, as a state of its own.
        fn stepWorker(explorer: *Explorer, before: *const State) !bool {
            var stepped = false;
            switch (before.worker.look) {
                .idle => {
                    const word = before.words[before.worker.scan % slots];
                    const room = before.worker.scan - before.tail < slots;
                    if (room and word.lap == before.worker.scan / slots and word.state != .free) {
                        var state = before.*;
                        state.worker.seen = word;
                        state.worker.look = .scan_head;
                        try explorer.add(&state);
                        stepped = true;
                    }
                    for (0..before.worker.passed_count) |index| {
                        var state = before.*;
                        state.worker.seen = before.words[before.worker.passed[index] % slots];
                        if (state.worker.seen.state == .passed and state.producers[state.worker.seen.owner].step != .dead) continue;
                        state.worker.index = @intCast(index);
                        state.worker.look = .passed_act;
                        try explorer.add(&state);
                        stepped = true;
                    }
                    if (before.tail < before.worker.scan and before.worker.finished[before.tail % slots]) {
                        var state = before.*;
                        state.worker.index = state.worker.span[state.tail % slots];
                        state.worker.look = .free_words;
                        try explorer.add(&state);
                        stepped = true;
                    }
                },
                .scan_head => {
                    var state = before.*;
                    if (state.head == state.worker.scan) state.head += state.worker.seen.span;
                    state.worker.look = .scan_act;
                    try explorer.add(&state);
                    stepped = true;
                },
                .scan_act => {
                    var state = before.*;
                    const worker = &state.worker;
                    const position = worker.scan;
                    const word = &state.words[position % slots];
                    const seen = worker.seen;
                    rest(worker);
                    switch (seen.state) {
                        .committed, .committed_passed => {
                            take(&state, position, seen);
                            see(worker, seen, true);
                        },
                        .padding, .aborted => see(worker, seen, true),
                        .claimed, .passed => {
                            if (state.producers[seen.owner].step == .dead) {
                                if (word.equals(seen)) word.state = .aborted;
                            } else {
                                const behind = position + seen.span;
                                const next = state.words[behind % slots];
                                const full = behind >= state.tail + slots;
                                if (full or (next.lap == behind / slots and next.state != .free)) {
                                    if (word.equals(seen)) {
                                        word.state = .passed;
                                        worker.passed[worker.passed_count] = position;
                                        worker.passed_count += 1;
                                        see(worker, seen, false);
                                    }
                                }
                            }
                        },
                        .free => unreachable,
                    }
                    try explorer.add(&state);
                    stepped = true;
                },
                .passed_act => {
                    var state = before.*;
                    const worker = &state.worker;
                    const index = worker.index;
                    const position = worker.passed[index];
                    const word = &state.words[position % slots];
                    const seen = worker.seen;
                    rest(worker);
                    switch (seen.state) {
                        .passed => if (word.equals(seen)) {
                            word.state = .aborted; // its owner is dead
                        },
                        .committed_passed, .aborted => {
                            if (seen.state == .committed_passed) take(&state, position, seen);
                            worker.finished[position % slots] = true;
                            worker.passed_count -= 1;
                            worker.passed[index] = worker.passed[worker.passed_count];
                            worker.passed[worker.passed_count] = 0;
                        },
                        else => unreachable,
                    }
                    try explorer.add(&state);
                    stepped = true;
                },
                .free_words => {
                    var state = before.*;
                    state.worker.index -= 1;
                    const position = state.tail + state.worker.index;
                    state.words[position % slots] = .{ .lap = position / slots + 1 };
                    if (state.worker.index == 0) state.worker.look = .move_tail;
                    try explorer.add(&state);
                    stepped = true;
                },
                .move_tail => {
                    var state = before.*;
                    const index = state.tail % slots;
                    state.tail += state.worker.span[index];
                    state.worker.span[index] = 0;
                    state.worker.finished[index] = false;
                    rest(&state.worker);
                    try explorer.add(&state);
                    stepped = true;
                },
            }
            return stepped;
        }

        fn explore(allocator: std.mem.Allocator, deaths: u8) !struct { states: usize, final_states: u64 } {
            var explorer = Explorer{ .visited = .init(allocator) };
            defer explorer.visited.deinit();
            defer explorer.pending.deinit(allocator);
            try explorer.add(&.{ .deaths_left = deaths });
            while (explorer.pending.pop()) |before| {
                var moved = try stepWorker(&explorer, &before);
                for (0..producers) |who| {
                    const step = before.producers[who].step;
                    if (step == .done or step == .dead) continue;
                    var state = before;
                    stepProducer(&state, who);
                    // Waiting for room or for a release is no progress of one's own.
                    const waits = step == .load_tail and state.producers[who].step == .load_head or
                        step == .await_release and state.producers[who].step == .await_release or
                        step == .load_head;
                    try explorer.add(&state);
                    if (!waits) moved = true;
                    if (step == .load_head and before.head + spans[who][before.producers[who].operation] <= before.tail + slots) moved = true;
                    if (before.deaths_left > 0) {
                        var dead = before;
                        dead.producers[who].step = .dead;
                        dead.deaths_left -= 1;
                        try explorer.add(&dead);
                    }
                }
                if (!moved) {
                    for (before.producers, before.taken) |producer, taken| {
                        assert(producer.step == .done or producer.step == .dead);
                        // One that died while it waited for a release had committed one more than it knew.
                        assert(taken == producer.operation or (producer.step == .dead and taken == producer.operation + 1));
                    }
                    assert(before.head == before.tail and before.worker.scan == before.tail);
                    explorer.final_states += 1;
                }
            }
            return .{ .states = explorer.visited.count(), .final_states = explorer.final_states };
        }
    };
}

test "no interleaving of producers and worker overlaps, loses, doubles or reorders a record" {
    const result = try Model(&.{ &.{ 2, 1 }, &.{ 1, 2 } }).explore(std.testing.allocator, 0);
    try std.testing.expect(result.states > 1000 and result.final_states > 0);
}

test "nor does one with a producer that dies at any step" {
    const result = try Model(&.{ &.{ 2, 1 }, &.{ 1, 2 } }).explore(std.testing.allocator, 1);
    try std.testing.expect(result.states > 10_000 and result.final_states > 0);
}

test "nor does one with three producers, that help each other's claims on" {
    const result = try Model(&.{ &.{2}, &.{ 1, 2 }, &.{1} }).explore(std.testing.allocator, 0);
    try std.testing.expect(result.states > 100_000 and result.final_states > 0);
}
