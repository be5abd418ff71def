//! How both sides touch the words of the ring that they share: each access here is one step of the protocol. A program
//! whose root declares `beforeSharedAccess` (ring_model.zig) comes in before every one of them, and so walks through
//! all orders in which the shipped functions can meet; in any other nothing is left of this file but the instruction.

const root = @import("root");
const AtomicOrder = @import("std").builtin.AtomicOrder;

pub const Access = enum { load, change };

inline fn step(comptime access: Access) void {
    if (@hasDecl(root, "beforeSharedAccess")) root.beforeSharedAccess(access);
}

pub inline fn load(comptime T: type, place: *const T, comptime order: AtomicOrder) T {
    step(.load);
    return @atomicLoad(T, place, order);
}

pub inline fn store(comptime T: type, place: *T, value: T, comptime order: AtomicOrder) void {
    step(.change);
    @atomicStore(T, place, value, order);
}

/// null where `place` held `expected`, and `new` stands there now; else what it held.
pub inline fn exchangeIf(comptime T: type, place: *T, expected: T, new: T, comptime success: AtomicOrder, comptime failure: AtomicOrder) ?T {
    step(.change);
    return @cmpxchgStrong(T, place, expected, new, success, failure);
}
