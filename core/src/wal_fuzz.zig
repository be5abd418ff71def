//! `make fuzz`: the simulation of the log with one seed after the other until it is stopped. `make fuzz SEED=7` runs
//! that seed alone, and `MUTANT=…` (engine/wal/mutant.zig) a log with that fault in it.

const std = @import("std");
const simulation = @import("testing/wal_simulation.zig");
const mutant = @import("engine/wal/mutant.zig");

pub const elgate_log_mutants = true;

fn number(name: []const u8) ?u64 {
    const text = std.posix.getenv(name) orelse return null;
    if (text.len == 0) return null;
    return std.fmt.parseInt(u64, text, 10) catch std.debug.panic("{s} is not a number: {s}", .{ name, text });
}

pub fn main() !u8 {
    if (std.posix.getenv("MUTANT")) |name| if (name.len > 0) {
        mutant.active = std.meta.stringToEnum(mutant.Mutant, name) orelse std.debug.panic("no such mutant: {s}", .{name});
    };
    const only = number("SEED");
    const count_max = number("SEEDS") orelse std.math.maxInt(u64);
    // So that two that run side by side do not do the same.
    var seed = only orelse std.crypto.random.int(u48);
    if (only == null) std.debug.print("from seed {d} on, until it is stopped (ctrl-C)\n", .{seed});
    var memory = simulation.Memory{};
    defer memory.deinit();
    var timer = try std.time.Timer.start();
    var reported_ns: u64 = 0;
    var failures: u64 = 0;
    var counts = simulation.Counts{};
    var done: u64 = 0;
    while (done < count_max) {
        if (simulation.run(&memory, .{ .seed = seed, .tells = only != null })) |result| counts.add(result) else |err| {
            failures += 1;
            std.debug.print("seed {d} ({s}): {s}. Once more: make fuzz SEED={d}\n", .{ seed, @tagName(simulation.profileOf(seed)), @errorName(err), seed });
        }
        done += 1;
        if (only != null) break;
        seed += 1;
        if (timer.read() - reported_ns < 5 * std.time.ns_per_s and done != count_max) continue;
        reported_ns = timer.read();
        std.debug.print("{d} seeds, {d} failed; {d} commits, {d} operations, {d} blows, {d} records lost to them; {d} seeds/s\n", .{
            done, failures, counts.commits, counts.operations, counts.strikes, counts.missing, done * std.time.ns_per_s / reported_ns,
        });
    }
    return if (failures == 0) 0 else 1;
}
