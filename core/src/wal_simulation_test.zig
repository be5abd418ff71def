//! The simulation of the log (testing/wal_simulation.zig), with as many seeds as a test has time for, and the proof
//! that it notices what it is there to notice. `make fuzz` runs it until it is stopped.

const std = @import("std");
const simulation = @import("testing/wal_simulation.zig");
const mutant = @import("engine/wal/mutant.zig");

const seed_count = 1000;

/// New ones each time, so that many runs see more; printed where one fails.
fn firstSeed() u64 {
    const text = std.posix.getenv("SEED") orelse return std.crypto.random.int(u48);
    return std.fmt.parseInt(u64, text, 10) catch @panic("SEED is not a number");
}

test "through cuts, kills, errors and damage: what was acknowledged comes back, in order, once, or is named" {
    var memory = simulation.Memory{};
    defer memory.deinit();
    var counts = simulation.Counts{};
    const first = firstSeed();
    for (0..seed_count) |index| {
        const seed = first + index;
        counts.add(simulation.run(&memory, .{ .seed = seed }) catch |err| {
            std.debug.print("\nsimulation of the log: {s}. Once more: make fuzz SEED={d}\n", .{ @errorName(err), seed });
            return err;
        });
    }
    // A simulation in which nothing happens holds too.
    try std.testing.expect(counts.commits > seed_count * 50);
    try std.testing.expect(counts.strikes > seed_count);
    try std.testing.expect(counts.missing > seed_count);
    try std.testing.expect(counts.kept > seed_count);
}

/// Seeds from 1 on, always the same, until one notices.
fn noticedAt(memory: *simulation.Memory, lock_is_ignored: bool) !?u64 {
    for (1..seed_count + 1) |seed| {
        _ = simulation.run(memory, .{ .seed = seed, .quiet = true, .lock_is_ignored = lock_is_ignored }) catch return seed;
    }
    return null;
}

test "each deliberate fault of the log is noticed" {
    var memory = simulation.Memory{};
    defer memory.deinit();
    defer mutant.active = null;
    for (std.enums.values(mutant.Mutant)) |fault| {
        if (fault.isOfUnsynced()) continue;
        mutant.active = fault;
        if (try noticedAt(&memory, false) == null) {
            std.debug.print("\nnot noticed with {d} seeds: {s}\n", .{ seed_count, @tagName(fault) });
            return error.NotNoticed;
        }
    }
}

test "a daemon that starts before the last write of the one before has landed is noticed" {
    var memory = simulation.Memory{};
    defer memory.deinit();
    try std.testing.expect(try noticedAt(&memory, true) != null);
}
