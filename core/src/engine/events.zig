//! What happened, as one JSON object per event, for whoever reads the engine's events (one reader). Bounded:
//! what nobody reads is dropped and counted. Any thread may post; posting never waits for the reader.
//!
//! Of each name the first ones come out, then one a second: much of what is said here is of clients' making, and none of
//! them may fill the log. How many were left out is said with the next one of that name, or once there is nothing else.

const std = @import("std");
const assert = std.debug.assert;
const os = @import("os.zig");
const Counters = @import("counters.zig").Counters;

pub const Level = enum { info, warning, @"error" };

const event_bytes_max = 1024;
const queue_length = 128;
/// Of one name, at once.
const burst = 256;
const refill_ns = std.time.ns_per_s;
const names_max = 128;

const Limit = struct {
    name: []const u8,
    room: u32 = burst,
    refilled_ns: u64,
    left_out: u64 = 0,

    fn refill(limit: *Limit, now_ns: u64) void {
        const more = (now_ns -| limit.refilled_ns) / refill_ns;
        limit.refilled_ns += more * refill_ns;
        limit.room = @intCast(@min(limit.room + more, burst));
    }
};

pub const Events = struct {
    counters: *Counters,
    mutex: std.Thread.Mutex = .{},
    texts: [queue_length][event_bytes_max]u8 = undefined,
    lengths: [queue_length]u16 = undefined,
    first: usize = 0,
    length: usize = 0,
    closed: bool = false,
    limits: [names_max]Limit = undefined,
    limit_count: usize = 0,
    /// Futex: moves with each post.
    sequence: u32 = 0,

    /// `fields`: an anonymous struct; integers, booleans and strings become JSON values of those names.
    pub fn post(events: *Events, level: Level, comptime event: []const u8, fields: anytype) void {
        const left_out = events.admit(event, os.monotonicNs()) orelse return;
        var text: [event_bytes_max]u8 = undefined;
        var writer = std.Io.Writer.fixed(&text);
        write(&writer, level, event, fields, left_out) catch {
            // Too long (a path near PATH_MAX): say at least what and how bad.
            writer = std.Io.Writer.fixed(&text);
            writer.print("{{\"event\":\"{s}\",\"level\":\"{s}\",\"truncated\":true}}", .{ event, @tagName(level) }) catch unreachable;
        };
        events.enqueue(text[0..writer.end]);
    }

    /// How many of that name were left out before this one; null: it is, too.
    fn admit(events: *Events, name: []const u8, now_ns: u64) ?u64 {
        events.mutex.lock();
        defer events.mutex.unlock();
        const limit = for (events.limits[0..events.limit_count]) |*known| {
            if (std.mem.eql(u8, known.name, name)) break known;
        } else new: {
            assert(events.limit_count < names_max);
            const added = &events.limits[events.limit_count];
            events.limit_count += 1;
            added.* = .{ .name = name, .refilled_ns = now_ns };
            break :new added;
        };
        limit.refill(now_ns);
        if (limit.room == 0) {
            limit.left_out += 1;
            events.counters.add(.events_left_out_total, 1);
            return null;
        }
        limit.room -= 1;
        defer limit.left_out = 0;
        return limit.left_out;
    }

    fn write(writer: *std.Io.Writer, level: Level, comptime event: []const u8, fields: anytype, left_out: u64) std.Io.Writer.Error!void {
        try writer.print("{{\"event\":\"{s}\",\"level\":\"{s}\"", .{ event, @tagName(level) });
        inline for (std.meta.fields(@TypeOf(fields))) |field| {
            const value = @field(fields, field.name);
            try writer.writeAll(",\"" ++ field.name ++ "\":");
            switch (@typeInfo(field.type)) {
                .int, .comptime_int => try writer.print("{d}", .{value}),
                .bool => try writer.writeAll(if (value) "true" else "false"),
                else => try std.json.Stringify.value(@as([]const u8, value), .{}, writer),
            }
        }
        if (left_out > 0) try writer.print(",\"left_out\":{d}", .{left_out});
        try writer.writeByte('}');
    }

    fn enqueue(events: *Events, text: []const u8) void {
        {
            events.mutex.lock();
            defer events.mutex.unlock();
            if (events.length == queue_length) {
                events.counters.add(.events_dropped_total, 1);
                return;
            }
            const index = (events.first + events.length) % queue_length;
            @memcpy(events.texts[index][0..text.len], text);
            events.lengths[index] = @intCast(text.len);
            events.length += 1;
        }
        _ = @atomicRmw(u32, &events.sequence, .Add, 1, .seq_cst);
        os.futexWake(&events.sequence, 1);
    }

    /// Length of the next event, copied to `buffer`; 0 where none came in time; null once closed and empty.
    pub fn next(events: *Events, buffer: []u8, timeout_ns: u64) ?usize {
        const deadline = os.monotonicNs() + timeout_ns;
        while (true) {
            const sequence = @atomicLoad(u32, &events.sequence, .seq_cst);
            if (events.dequeue(buffer)) |length| return length;
            const closed = @atomicLoad(bool, &events.closed, .acquire);
            const now = os.monotonicNs();
            if (closed or now >= deadline) {
                if (events.nextLeftOut(buffer)) |length| return length;
                return if (closed) null else 0;
            }
            os.futexWait(&events.sequence, sequence, deadline - now);
        }
    }

    fn dequeue(events: *Events, buffer: []u8) ?usize {
        events.mutex.lock();
        defer events.mutex.unlock();
        if (events.length == 0) return null;
        const length = @min(events.lengths[events.first], buffer.len);
        @memcpy(buffer[0..length], events.texts[events.first][0..length]);
        events.first = (events.first + 1) % queue_length;
        events.length -= 1;
        return length;
    }

    /// What nothing of its name has said since.
    fn nextLeftOut(events: *Events, buffer: []u8) ?usize {
        events.mutex.lock();
        defer events.mutex.unlock();
        for (events.limits[0..events.limit_count]) |*limit| {
            if (limit.left_out == 0) continue;
            var writer = std.Io.Writer.fixed(buffer);
            writer.print("{{\"event\":\"events_left_out\",\"level\":\"warning\",\"of\":\"{s}\",\"count\":{d}}}", .{ limit.name, limit.left_out }) catch return null;
            limit.left_out = 0;
            return writer.end;
        }
        return null;
    }

    pub fn close(events: *Events) void {
        @atomicStore(bool, &events.closed, true, .release);
        _ = @atomicRmw(u32, &events.sequence, .Add, 1, .seq_cst);
        os.futexWake(&events.sequence, 1);
    }
};

test "events come out as JSON, in order, and more than fit are dropped and counted" {
    var counters = Counters{};
    var events = Events{ .counters = &counters };
    events.post(.warning, "thing_happened", .{ .path = "/a\"b", .errno = @as(i32, 5), .again = true });
    var buffer: [event_bytes_max]u8 = undefined;
    const length = events.next(&buffer, 0).?;
    try std.testing.expectEqualStrings("{\"event\":\"thing_happened\",\"level\":\"warning\",\"path\":\"/a\\\"b\",\"errno\":5,\"again\":true}", buffer[0..length]);
    for (0..queue_length + 3) |_| events.post(.info, "x", .{});
    try std.testing.expectEqual(@as(u64, 3), counters.get(.events_dropped_total));
    events.close();
    while (events.next(&buffer, 0)) |_| {}
}

test "of many of one name the first come out, then one a second, and how many were left out" {
    var counters = Counters{};
    var events = Events{ .counters = &counters };
    const begun_ns: u64 = 1000 * refill_ns;
    for (0..burst) |_| try std.testing.expectEqual(0, events.admit("flood", begun_ns));
    for (0..7) |_| try std.testing.expectEqual(null, events.admit("flood", begun_ns + refill_ns - 1));
    try std.testing.expectEqual(0, events.admit("other", begun_ns));
    try std.testing.expectEqual(7, events.admit("flood", begun_ns + refill_ns));
    try std.testing.expectEqual(null, events.admit("flood", begun_ns + refill_ns));
    try std.testing.expectEqual(8, counters.get(.events_left_out_total));
    // Nothing of that name comes any more: it is said all the same, once.
    var buffer: [event_bytes_max]u8 = undefined;
    const length = events.next(&buffer, 0).?;
    try std.testing.expectEqualStrings("{\"event\":\"events_left_out\",\"level\":\"warning\",\"of\":\"flood\",\"count\":1}", buffer[0..length]);
    try std.testing.expectEqual(0, events.next(&buffer, 0));
    for (0..burst) |_| try std.testing.expectEqual(0, events.admit("flood", begun_ns + 10 * burst * refill_ns));
    try std.testing.expectEqual(null, events.admit("flood", begun_ns + 10 * burst * refill_ns));
    events.close();
    try std.testing.expect(events.next(&buffer, 0).? > 0);
    try std.testing.expectEqual(null, events.next(&buffer, 0));
}
