//! What happened, as one JSON object per event, for whoever reads the engine's events (one reader). Bounded:
//! what nobody reads is dropped and counted. Any thread may post; posting never waits for the reader.

const std = @import("std");
const os = @import("os.zig");
const Counters = @import("counters.zig").Counters;

pub const Level = enum { info, warning, @"error" };

const event_bytes_max = 1024;
const queue_length = 128;

pub const Events = struct {
    counters: *Counters,
    mutex: std.Thread.Mutex = .{},
    texts: [queue_length][event_bytes_max]u8 = undefined,
    lengths: [queue_length]u16 = undefined,
    first: usize = 0,
    length: usize = 0,
    closed: bool = false,
    /// Futex: moves with each post.
    sequence: u32 = 0,

    /// `fields`: an anonymous struct; integers, booleans and strings become JSON values of those names.
    pub fn post(events: *Events, level: Level, comptime event: []const u8, fields: anytype) void {
        var text: [event_bytes_max]u8 = undefined;
        var writer = std.Io.Writer.fixed(&text);
        write(&writer, level, event, fields) catch {
            // Too long (a path near PATH_MAX): say at least what and how bad.
            writer = std.Io.Writer.fixed(&text);
            writer.print("{{\"event\":\"{s}\",\"level\":\"{s}\",\"truncated\":true}}", .{ event, @tagName(level) }) catch unreachable;
        };
        events.enqueue(text[0..writer.end]);
    }

    fn write(writer: *std.Io.Writer, level: Level, comptime event: []const u8, fields: anytype) std.Io.Writer.Error!void {
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
            if (@atomicLoad(bool, &events.closed, .acquire)) return null;
            const now = os.monotonicNs();
            if (now >= deadline) return 0;
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
