//! The ring's protocol, walked through step by step: the shipped functions of both sides (client/producer.zig,
//! engine/consumer.zig), a few producers and a worker, in a ring of eight slots. Each access to a shared word is a
//! step; between two steps anybody else may go on, a producer may die, and so may the daemon. All runs are tried in which
//! somebody comes out of turn at most so many times (delay-bounded scheduling: Emmi, Qadeer and Rakamarić, POPL 2011;
//! most faults need few). A program:
//!
//!     zig run -lc -fllvm -Icore/include core/src/ring_model.zig -- [interruptions]
//!
//! What is asserted: whoever copies owns all slots that he copies into; the worker takes only whole records, each once,
//! each producer's in order; what was committed is taken, whoever dies; nobody waits for ever.

const std = @import("std");
const assert = std.debug.assert;
const ring = @import("format/ring.zig");
const shared = @import("format/shared.zig");
const producer = @import("client/producer.zig");
const Consumer = @import("engine/consumer.zig").Consumer;
const Counters = @import("engine/counters.zig").Counters;

pub const ring_slot_count: u32 = 8;

// ---- fibers ------------------------------------------------------------------------------------------------------

/// The part of the C library's ucontext_t that has to be filled in; room for all of it.
const Context = extern struct {
    flags: c_ulong,
    link: ?*Context,
    stack: extern struct { base: ?[*]u8, flags: c_int, size_bytes: usize },
    rest: [8192]u8 align(16),
};
extern "c" fn getcontext(context: *Context) c_int;
extern "c" fn makecontext(context: *Context, function: *const fn () callconv(.c) void, count: c_int, ...) void;
extern "c" fn swapcontext(from: *Context, to: *const Context) c_int;

const actors_max = 5;
const stack_bytes = 256 << 10;

const Actor = struct {
    context: Context align(16) = undefined,
    stack: []align(16) u8,
    state: enum { unused, running, ended, dead } = .unused,
    /// `changes` before it found nothing to do; it goes on after another one.
    waiting_since: ?u64 = null,
    steps: u32 = 0,
};

var actors: [actors_max]Actor = undefined;
var actor_count: usize = 0;
var current: ?usize = null;
var scheduler: Context align(16) = undefined;
/// Accesses that may have changed something.
var changes: u64 = 0;

pub fn beforeSharedAccess(comptime access: shared.Access) void {
    if (current == null) return;
    yield();
    if (access == .change) changes += 1;
}

fn yield() void {
    const actor = &actors[current.?];
    if (swapcontext(&actor.context, &scheduler) != 0) @panic("swapcontext");
}

/// Until somebody has changed something since `seen`, which was read before the look that found nothing (the futexes
/// and the doorbell do that for the real ones).
fn wait(seen: u64) void {
    actors[current.?].waiting_since = seen;
    yield();
    actors[current.?].waiting_since = null;
}

fn begin(index: usize, body: *const fn () callconv(.c) void) void {
    const actor = &actors[index];
    if (getcontext(&actor.context) != 0) @panic("getcontext");
    actor.context.stack = .{ .base = actor.stack.ptr, .flags = 0, .size_bytes = actor.stack.len };
    actor.context.link = &scheduler;
    makecontext(&actor.context, body, 0);
    actor.state = .running;
    actor.waiting_since = null;
    actor.steps = 0;
}

// ---- choices -----------------------------------------------------------------------------------------------------

/// The run is determined by these: at the n-th choice, which of so many.
const Choice = struct { taken: u8, count: u8 };
var choices: [4096]Choice = undefined;
var choice_count: usize = 0;
var choice_known: usize = 0;

fn choose(count: u8) u8 {
    if (count == 1) return 0;
    if (choice_count == choices.len) fail("more than {d} choices in one run: somebody does not get on", .{choices.len});
    if (choice_count == choice_known) {
        choices[choice_count] = .{ .taken = 0, .count = count };
        choice_known += 1;
    }
    assert(choices[choice_count].count == count); // the run is the same up to here
    choice_count += 1;
    return choices[choice_count - 1].taken;
}

/// The next run that has not been tried, in the order of a depth-first search. false: that was all.
fn nextRun() bool {
    while (choice_known > 0) {
        const last = &choices[choice_known - 1];
        if (last.taken + 1 < last.count) {
            last.taken += 1;
            return true;
        }
        choice_known -= 1;
    }
    return false;
}

fn fail(comptime format: []const u8, arguments: anytype) noreturn {
    std.debug.print("\nring_model: {s}: " ++ format ++ "\nthe choices of this run:", .{scenario.name} ++ arguments);
    for (choices[0..choice_count]) |choice| std.debug.print(" {d}", .{choice.taken});
    std.debug.print("\nstate words:", .{});
    for (0..ring.slot_count) |slot| {
        const word: ring.StateWord = @bitCast(view.stateWord(slot).*);
        std.debug.print(" {d}:{s}({d},{d})", .{ word.lap, std.enums.tagName(ring.State, word.state) orelse "?", word.owner, word.span });
    }
    std.debug.print("\nhead {d} tail {d} scan {d}, {d} passed, {d} left behind, {d} holes\n", .{ view.header().head, view.header().tail, consumer.scan, consumer.passed_count, consumer.left_count, consumer.hole_count });
    for (actors[0..actor_count], 0..) |actor, index| std.debug.print("actor {d}: {s}, waits since {?d} of {d}\n", .{ index, @tagName(actor.state), actor.waiting_since, changes });
    std.process.exit(1);
}

// ---- what is tried -----------------------------------------------------------------------------------------------

const Script = struct {
    /// Slots of its operations, one after the other.
    spans: []const u8,
    /// Stopped in the middle of its first claim until all others are done.
    stops: bool = false,
    /// Its first operation is kept by the worker (its log fails) until all producers are done.
    held: bool = false,
};

const Scenario = struct {
    name: []const u8,
    producers: []const Script,
    producer_deaths: u8 = 0,
    daemon_deaths: u8 = 0,
    /// Where in the ring it begins.
    start: u64 = 6,
    /// Of those that take millions of runs: with one interruption less than the others.
    long: bool = false,
};

const scenarios = [_]Scenario{
    .{ .name = "two producers, spans of one and two", .producers = &.{ .{ .spans = &.{ 2, 1 } }, .{ .spans = &.{ 1, 2 } } } },
    .{ .name = "three producers help each other on", .producers = &.{ .{ .spans = &.{2} }, .{ .spans = &.{ 1, 2 } }, .{ .spans = &.{1} } } },
    .{ .name = "a producer dies", .producers = &.{ .{ .spans = &.{ 2, 1 } }, .{ .spans = &.{ 1, 2, 1 } } }, .producer_deaths = 1 },
    .{ .name = "the daemon dies", .producers = &.{ .{ .spans = &.{ 2, 1 } }, .{ .spans = &.{ 1, 2 } } }, .daemon_deaths = 1 },
    .{ .name = "a stopped producer is left behind", .producers = &.{ .{ .spans = &.{ 1, 2 }, .stops = true }, .{ .spans = &.{ 2, 1, 2, 1, 2, 2, 1, 1, 1 } } } },
    .{ .name = "two are, and a third one goes on", .producers = &.{ .{ .spans = &.{2}, .stops = true }, .{ .spans = &.{ 1, 1 }, .stops = true }, .{ .spans = &.{ 2, 2, 1, 2, 1, 1 } } }, .start = 3 },
    .{ .name = "a stopped one is left behind and the daemon dies", .producers = &.{ .{ .spans = &.{ 2, 1 }, .stops = true }, .{ .spans = &.{ 1, 2, 1, 2, 1, 1, 2 } } }, .daemon_deaths = 1, .long = true },
    .{ .name = "a stopped one is left behind and dies", .producers = &.{ .{ .spans = &.{ 2, 1 }, .stops = true }, .{ .spans = &.{ 1, 2, 1, 2, 1, 1, 2 } } }, .producer_deaths = 1, .long = true },
    .{ .name = "a record that the log refuses is left behind", .producers = &.{ .{ .spans = &.{ 1, 2 }, .held = true }, .{ .spans = &.{ 2, 1, 2, 1, 2, 2 } } } },
    .{ .name = "and the daemon dies", .producers = &.{ .{ .spans = &.{2}, .held = true }, .{ .spans = &.{ 2, 1, 2, 1, 1 } } }, .daemon_deaths = 1, .long = true },
};

var scenario: *const Scenario = &scenarios[0];
var interruptions_max: u32 = 2;
var interruptions_of_scenario: u32 = 0;

const Content = struct { owner: usize, position: u64 };

var view: ring.View = undefined;
var consumer: *Consumer = undefined;
var counters = Counters{};
var contents: [ring.slot_count]Content = undefined;
/// By producer: its operations that it knows to be committed, and those that the worker has taken.
var committed: [actors_max]u8 = undefined;
var taken: [actors_max]u8 = undefined;
/// What the log has, by position: it outlives the daemon.
var logged: [256]bool = undefined;
var held_positions: [8]u64 = undefined;
var held_count: usize = 0;

fn producersEnded(but: usize) bool {
    for (0..scenario.producers.len) |index| {
        if (index != but and actors[index].state == .running and !(scenario.producers[index].stops and committed[index] == 0)) return false;
    }
    return true;
}

fn produce() callconv(.c) void {
    const index = current.?;
    const script = &scenario.producers[index];
    var allowed: u64 = 0;
    for (script.spans, 0..) |span, number| {
        var opening: u64 = 0;
        const open = while (true) {
            const seen = changes;
            break producer.claim(view, @intCast(index), span, null, &opening, &allowed) catch |err| switch (err) {
                error.Full => {
                    wait(seen);
                    continue;
                },
                error.Damaged => fail("producer {d} calls the ring damaged", .{index}),
            };
        };
        if (script.stops and number == 0) {
            while (!producersEnded(index)) wait(changes);
        }
        for (0..span) |slot| {
            beforeSharedAccess(.change);
            for (0..scenario.producers.len) |other| {
                if (other == index or actors[other].state != .running) continue;
                const theirs = open_claims[other] orelse continue;
                for (theirs.position..theirs.position + theirs.span()) |at| {
                    if (at % ring.slot_count == (open.position + slot) % ring.slot_count) fail("producers {d} and {d} copy into one slot", .{ index, other });
                }
            }
            open_claims[index] = open;
            contents[ring.slotIndex(open.position + slot)] = .{ .owner = index, .position = open.position };
        }
        var header = std.mem.zeroes(ring.SlotHeader);
        header.length_bytes = (@as(u32, span) - 1) * ring.slot_size;
        header.operation = @intFromEnum(ring.Operation.write);
        header.position = open.position;
        header.offset = number;
        header.header_checksum = header.computeChecksum();
        view.slotHeader(open.position).* = header;
        const outcome = producer.commit(open);
        open_claims[index] = null;
        if (outcome == .aborted) fail("the claim of producer {d}, which lives, was given up", .{index});
        committed[index] += 1;
        if (outcome == .committed_passed) {
            while (true) {
                const seen = changes;
                if (producer.isReleased(view, open.position)) break;
                wait(seen);
            }
        }
    }
    finish(index);
}

var open_claims: [actors_max]?producer.Claim = undefined;

fn finish(index: usize) void {
    actors[index].state = .ended;
    changes += 1;
}

fn take(position: u64, owner: u32, header: *const ring.SlotHeader) void {
    const span = ring.spanForLength(header.length_bytes);
    for (0..span) |slot| {
        const content = contents[ring.slotIndex(position + slot)];
        if (content.owner != owner or content.position != position) fail("the record of producer {d} at {d} is not whole", .{ owner, position });
    }
    if (logged[position]) return; // by the daemon before
    if (header.offset != taken[owner]) fail("producer {d}: operation {d} comes where {d} should", .{ owner, header.offset, taken[owner] });
    logged[position] = true;
    taken[owner] += 1;
}

fn work() callconv(.c) void {
    const index = current.?;
    while (true) {
        var any = false;
        const seen = changes;
        const tail_before = consumer.tail;
        while (true) {
            var passed = false;
            const item = consumer.next() orelse blk: {
                passed = true;
                break :blk consumer.nextPassed() orelse break;
            };
            any = true;
            const held = scenario.producers[item.owner].held and item.header.offset == 0 and !logged[item.position] and !producersEnded(item.owner);
            if (held) {
                consumer.consumeHeld(&item, 0);
                held_positions[held_count] = item.position;
                held_count += 1;
                held_owner = item.owner;
                // What comes behind it in the same log is refused before it is sent; here its producer just goes on.
                taken[item.owner] += 1;
                held_taken = true;
            } else {
                take(item.position, item.owner, &item.header);
                if (passed) consumer.consumeHeld(&item, 0) else consumer.consume(&item, 0);
                if (passed) consumer.settle(item.position);
            }
        }
        if (held_count > 0 and producersEnded(held_owner)) {
            for (held_positions[0..held_count]) |position| {
                logged[position] = true;
                consumer.settle(position);
            }
            held_count = 0;
            held_taken = false;
            any = true;
        }
        if (consumer.release()) consumer.wakeProducers();
        if (consumer.tail != tail_before) any = true;
        if (consumer.takeDamage()) |damage| fail("damage at {d}: {s}", .{ damage.position, damage.reason });
        const head = view.header().head;
        if (!any and !consumer.somethingToDo()) {
            if (allEnded() and head == consumer.tail and consumer.scan == consumer.tail and consumer.left_count == 0) break;
            wait(seen);
        }
    }
    finish(index);
}

var held_owner: u32 = 0;
var held_taken = false;

fn allEnded() bool {
    for (0..scenario.producers.len) |index| {
        if (actors[index].state == .running) return false;
    }
    return true;
}

fn mutexOf(row: usize) *u32 {
    return @ptrCast(&view.producerRow(@intCast(row)).mutex);
}

fn startDaemon() void {
    const before = current;
    current = null;
    defer current = before;
    // A record that the daemon before held is in no log.
    if (held_taken) taken[held_owner] -= 1;
    held_taken = false;
    held_count = 0;
    consumer.* = Consumer.init(view, &counters);
    begin(scenario.producers.len, work);
}

fn prepare() void {
    @memset(view.memory[0..ring.producer_rows_offset], 0);
    for (0..ring.slot_count) |offset| {
        const at = scenario.start + offset;
        view.stateWord(at).* = ring.StateWord.free(ring.lapOf(at)).bits();
    }
    view.header().head = scenario.start;
    view.header().tail = scenario.start;
    committed = @splat(0);
    taken = @splat(0);
    logged = @splat(false);
    open_claims = @splat(null);
    held_taken = false;
    changes = 0;
    current = null;
    actor_count = scenario.producers.len + 1;
    for (0..scenario.producers.len) |index| {
        mutexOf(index).* = @intCast(1000 + index);
        begin(index, produce);
    }
    startDaemon();
}

fn isReady(index: usize) bool {
    const actor = &actors[index];
    if (actor.state != .running) return false;
    return if (actor.waiting_since) |since| changes != since else true;
}

fn run() void {
    prepare();
    var interruptions = interruptions_of_scenario;
    var producer_deaths = scenario.producer_deaths;
    var daemon_deaths = scenario.daemon_deaths;
    var last: usize = 0;
    var steps: u32 = 0;
    while (true) {
        steps += 1;
        if (steps > 20_000) fail("no end after {d} steps", .{steps});
        var ready: [actors_max]usize = undefined;
        var ready_count: usize = 0;
        const goes_on = isReady(last);
        if (goes_on) {
            ready[0] = last;
            ready_count = 1;
        }
        for (1..actor_count) |after| {
            const index = (last + after) % actor_count;
            if (ready_count > 0 and interruptions == 0) break;
            if (!isReady(index)) continue;
            ready[ready_count] = index;
            ready_count += 1;
        }
        if (ready_count == 0) {
            for (actors[0..actor_count], 0..) |*actor, index| {
                if (actor.state == .running) fail("actor {d} waits for ever", .{index});
            }
            break;
        }
        // Instead of going on, the one whose turn it was may die.
        const is_worker = last == actor_count - 1;
        const may_die = goes_on and if (is_worker) daemon_deaths > 0 else producer_deaths > 0;
        const choice = choose(@intCast(ready_count + @intFromBool(may_die)));
        if (choice == ready_count) {
            changes += 1;
            if (is_worker) {
                daemon_deaths -= 1;
                startDaemon();
            } else {
                producer_deaths -= 1;
                actors[last].state = .dead;
                mutexOf(last).* |= ring.mutex_owner_died;
            }
            continue;
        }
        const next = ready[choice];
        // Another one than the one whose turn it is.
        if (choice > 0) interruptions -= 1;
        last = next;
        current = next;
        if (swapcontext(&scheduler, &actors[next].context) != 0) @panic("swapcontext");
        current = null;
    }
    for (0..scenario.producers.len) |index| {
        const known = committed[index];
        // One that died may have committed one more than it knew.
        if (taken[index] != known and !(actors[index].state == .dead and taken[index] == known + 1)) {
            fail("producer {d}: {d} committed, {d} taken", .{ index, known, taken[index] });
        }
    }
}

pub fn main() !void {
    var arguments = std.process.args();
    _ = arguments.next();
    if (arguments.next()) |text| interruptions_max = try std.fmt.parseInt(u32, text, 10);
    const allocator = std.heap.c_allocator;
    view = .{ .memory = try allocator.alignedAlloc(u8, .fromByteUnits(std.heap.page_size_min), ring.file_size) };
    @memset(view.memory, 0);
    consumer = try allocator.create(Consumer);
    for (&actors) |*actor| actor.* = .{ .stack = try allocator.alignedAlloc(u8, .fromByteUnits(16), stack_bytes) };
    for (&scenarios) |*tried| {
        scenario = tried;
        choice_known = 0;
        interruptions_of_scenario = if (tried.long) interruptions_max -| 1 else interruptions_max;
        var runs: u64 = 0;
        var timer = try std.time.Timer.start();
        while (true) {
            choice_count = 0;
            run();
            runs += 1;
            if (!nextRun()) break;
        }
        std.debug.print("ring_model: {s}: {d} runs with up to {d} interruptions, {d} ms\n", .{ tried.name, runs, interruptions_of_scenario, timer.read() / std.time.ns_per_ms });
    }
}
