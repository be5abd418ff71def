//! Operations that are taken from a ring and cannot be done yet. Their slots are held, and each has its place beside its
//! slot, so that there is always memory for it. Worker thread.

const std = @import("std");
const assert = std.debug.assert;
const Item = @import("consumer.zig").Item;
const ServedRing = @import("served_ring.zig").ServedRing;

pub const Waiting = struct {
    ring: *ServedRing,
    item: Item,
    next: ?*Waiting,
};

/// First in, first out.
pub const List = struct {
    first: ?*Waiting = null,
    last: ?*Waiting = null,

    pub fn isEmpty(list: *const List) bool {
        return list.first == null;
    }

    /// The item's slot is held, and was in no list, until whoever takes it out settles it.
    pub fn append(list: *List, ring: *ServedRing, item: *const Item) void {
        const waiting = ring.waitingAt(item.position);
        waiting.* = .{ .ring = ring, .item = item.*, .next = null };
        list.add(waiting);
    }

    fn add(list: *List, waiting: *Waiting) void {
        assert(waiting.next == null);
        if (list.last) |last| last.next = waiting else list.first = waiting;
        list.last = waiting;
    }

    pub fn takeFirst(list: *List) ?*Waiting {
        const waiting = list.first orelse return null;
        list.first = waiting.next;
        if (list.first == null) list.last = null;
        waiting.next = null;
        return waiting;
    }

    /// Those for one file, in their order, go to another list.
    pub fn move(list: *List, file_id: u64, to: *List) void {
        var rest = List{};
        while (list.takeFirst()) |waiting| {
            (if (waiting.item.header.file_id == file_id) to else &rest).add(waiting);
        }
        list.* = rest;
    }
};
