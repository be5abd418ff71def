//! The ring's protocol from the producers' side, against a consumer that checks every slot.

const std = @import("std");
const testing = std.testing;
const ring = @import("../format/ring.zig");
const positions = @import("../format/positions.zig");
const producer = @import("producer.zig");
const wait = @import("wait.zig");
const fake = @import("../testing/fake_daemon.zig");
const thread_sanitized = @import("builtin").sanitize_thread;

extern "c" fn pthread_mutex_lock(mutex: *anyopaque) c_int;
extern "c" fn pthread_mutex_unlock(mutex: *anyopaque) c_int;

fn header(length_bytes: u32) ring.SlotHeader {
    var fields = std.mem.zeroes(ring.SlotHeader);
    fields.length_bytes = length_bytes;
    fields.operation = @intFromEnum(ring.Operation.append);
    return fields;
}

fn ignore(_: void, _: *const fake.Record) void {}

fn lock(view: ring.View, row: u32) void {
    std.debug.assert(pthread_mutex_lock(&view.producerRow(row).mutex) == 0);
}

fn unlock(view: ring.View, row: u32) void {
    std.debug.assert(pthread_mutex_unlock(&view.producerRow(row).mutex) == 0);
}

fn take(view: ring.View, row: u32, span: u32) !producer.Claim {
    var opening: u64 = 0;
    var allowed: u64 = 0;
    const claim = try producer.claim(view, row, span, null, &opening, &allowed);
    try testing.expectEqual(claim.position + 1, opening);
    return claim;
}

const Crowd = struct {
    const producers = 4;
    const records_each: u64 = if (thread_sanitized) 4_000 else 60_000;

    view: ring.View,
    seed: u64,
    next: [producers]u64 = @splat(0),
    waits: u64 = 0,
    passed: u64 = 0,
    wrong: u64 = 0,

    fn lengthOf(random: std.Random) u32 {
        // Mostly small, as records are; now and then up to the longest there is.
        return switch (random.uintLessThan(u32, 100)) {
            0 => random.uintAtMost(u32, ring.payload_bytes_max),
            1...10 => random.uintAtMost(u32, 20_000),
            else => 16 + random.uintAtMost(u32, 300),
        };
    }

    fn fill(payload: []u8, who: u32, number: u64) void {
        if (payload.len >= 4) std.mem.writeInt(u32, payload[0..4], who, .little);
        if (payload.len >= 12) std.mem.writeInt(u64, payload[4..12], number, .little);
        if (payload.len > 12) @memset(payload[12..], @truncate(number *% 31 +% who));
    }

    fn produce(crowd: *Crowd, who: u32) void {
        lock(crowd.view, who);
        defer unlock(crowd.view, who);
        var generator = std.Random.DefaultPrng.init(crowd.seed +% who);
        const random = generator.random();
        var number: u64 = 0;
        while (number < records_each) : (number += 1) {
            const length = @max(12, lengthOf(random));
            const span = ring.spanForLength(length);
            var opening: u64 = 0;
            var allowed: u64 = 0;
            const claim = while (true) {
                break producer.claim(crowd.view, who, span, null, &opening, &allowed) catch |err| {
                    std.debug.assert(err == error.Full);
                    const space = wait.Space.begin(crowd.view);
                    defer space.end();
                    break producer.claim(crowd.view, who, span, null, &opening, &allowed) catch {
                        _ = @atomicRmw(u64, &crowd.waits, .Add, 1, .monotonic);
                        _ = space.sleep();
                        continue;
                    };
                };
            };
            fill(producer.payload(claim)[0..length], who, number);
            producer.seal(claim, header(length));
            switch (producer.commit(claim)) {
                .committed => {},
                .committed_passed => {
                    _ = @atomicRmw(u64, &crowd.passed, .Add, 1, .monotonic);
                    while (!producer.isReleased(crowd.view, claim.position)) {
                        const space = wait.Space.begin(crowd.view);
                        defer space.end();
                        if (!producer.isReleased(crowd.view, claim.position)) _ = space.sleep();
                    }
                },
                .aborted => unreachable,
            }
            producer.ringDoorbell(crowd.view);
        }
    }

    fn perform(crowd: *Crowd, record: *const fake.Record) void {
        const who = std.mem.readInt(u32, record.payload[0..4], .little);
        const number = std.mem.readInt(u64, record.payload[4..12], .little);
        var right = who < producers and who == record.owner and number == crowd.next[who];
        for (record.payload[12..]) |byte| right = right and byte == @as(u8, @truncate(number *% 31 +% who));
        if (right) crowd.next[who] += 1 else crowd.wrong += 1;
    }

    fn total(crowd: *const Crowd) u64 {
        var sum: u64 = 0;
        for (crowd.next) |count| sum += count;
        return sum;
    }
};

test "many producers: every record is taken exactly once, whole, and in its producer's order" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const seed = std.crypto.random.int(u64);
    errdefer std.debug.print("seed {d}\n", .{seed});
    var crowd = Crowd{ .view = test_ring.view, .seed = seed };
    var consumer = fake.Consumer.init(test_ring.view);
    var threads: [Crowd.producers]std.Thread = undefined;
    for (&threads, 0..) |*thread, who| thread.* = try std.Thread.spawn(.{}, Crowd.produce, .{ &crowd, @as(u32, @intCast(who)) });
    while (crowd.total() + crowd.wrong + consumer.damaged < Crowd.producers * Crowd.records_each) {
        if (!consumer.poll(&crowd, Crowd.perform)) std.Thread.yield() catch {};
        consumer.release();
    }
    for (threads) |thread| thread.join();
    while (consumer.poll(&crowd, Crowd.perform)) {}
    consumer.release();
    try testing.expectEqual(0, crowd.wrong);
    try testing.expectEqual(0, consumer.damaged);
    try testing.expectEqual(0, consumer.aborted);
    for (crowd.next) |count| try testing.expectEqual(Crowd.records_each, count);
    const shared = test_ring.view.header();
    try testing.expectEqual(shared.head, shared.tail);
    try testing.expectEqual(0, shared.space_waiters);
    try testing.expect(crowd.waits > 0);
    try testing.expect(consumer.padded > 0);
}

test "a span never crosses the ring's end: a padding span fills up" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const view = test_ring.view;
    test_ring.startAt(5 * ring.slot_count + 1020);
    const claim = try take(view, 3, 8);
    try testing.expectEqual(6 * ring.slot_count, claim.position);
    const padding = view.loadState(5 * ring.slot_count + 1020);
    try testing.expectEqual(ring.State.padding, padding.state);
    try testing.expectEqual(4, padding.span);
    // What just fits needs none.
    test_ring.startAt(1016);
    try testing.expectEqual(1016, (try take(view, 3, 8)).position);
    try testing.expectEqual(1024, view.header().head);
}

test "a full ring says so, padding included, and takes again what was released" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const view = test_ring.view;
    var consumer = fake.Consumer.init(view);
    for (0..4) |_| {
        const claim = try take(view, 1, 256);
        producer.seal(claim, header(ring.payload_bytes_max));
        try testing.expectEqual(.committed, producer.commit(claim));
    }
    var opening: u64 = 0;
    var allowed: u64 = 0;
    try testing.expectError(error.Full, producer.claim(view, 1, 1, null, &opening, &allowed));
    try testing.expectEqual(0, opening);
    _ = consumer.poll({}, ignore);
    consumer.release();
    try testing.expectEqual(0, consumer.damaged);
    _ = try take(view, 1, 1);
    _ = try take(view, 1, 255);
    _ = try take(view, 1, 256);
    _ = try take(view, 1, 256);
    // 256 slots are left at the end, the span fits; then the ring is full again.
    _ = try take(view, 1, 256);
    try testing.expectError(error.Full, producer.claim(view, 1, 1, null, &opening, &allowed));
}

test "an owner that commits behind the worker's back learns that its claim was passed" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const view = test_ring.view;
    lock(view, 1);
    defer unlock(view, 1);
    var consumer = fake.Consumer.init(view);
    const slow = try take(view, 1, 2);
    const quick = try take(view, 1, 1);
    producer.seal(quick, header(10));
    try testing.expectEqual(.committed, producer.commit(quick));
    _ = consumer.poll({}, ignore);
    consumer.release();
    try testing.expectEqual(ring.State.passed, view.loadState(slow.position).state);
    try testing.expectEqual(slow.position, view.header().tail);
    producer.seal(slow, header(5000));
    try testing.expectEqual(.committed_passed, producer.commit(slow));
    try testing.expect(!producer.isReleased(view, slow.position));
    _ = consumer.poll({}, ignore);
    consumer.release();
    try testing.expect(producer.isReleased(view, slow.position));
    try testing.expectEqual(view.header().head, view.header().tail);
    try testing.expectEqual(0, consumer.damaged);
}

test "an owner that was fenced cannot commit" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const view = test_ring.view;
    var consumer = fake.Consumer.init(view);
    // Nobody holds the row's mutex: its owner is dead.
    const claim = try take(view, 7, 1);
    producer.seal(claim, header(1));
    _ = consumer.poll({}, ignore);
    try testing.expectEqual(1, consumer.aborted);
    try testing.expectEqual(.aborted, producer.commit(claim));
    consumer.release();
    try testing.expectEqual(.aborted, producer.commit(claim));
    try testing.expectEqual(1, view.header().tail);
}

test "a claim can be given up by its owner alone, passed or not, and only while it is open" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const view = test_ring.view;
    const claim = try take(view, 7, 1);
    try testing.expect(!producer.abort(view, 8, claim.position));
    try testing.expect(!producer.abort(view, 7, claim.position + ring.slot_count));
    try testing.expect(producer.abort(view, 7, claim.position));
    try testing.expect(!producer.abort(view, 7, claim.position));
    const passed = try take(view, 7, 1);
    view.stateWord(passed.position).* = passed.word.with(.passed).bits();
    try testing.expect(producer.abort(view, 7, passed.position));
    const committed = try take(view, 7, 1);
    producer.seal(committed, header(0));
    try testing.expectEqual(.committed, producer.commit(committed));
    try testing.expect(!producer.abort(view, 7, committed.position));
}

test "who finds the head behind a claim moves it on" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const view = test_ring.view;
    const dead = ring.StateWord{ .state = .claimed, .span = 5, .owner = 9, .lap = 0 };
    view.stateWord(0).* = dead.bits();
    const claim = try take(view, 1, 2);
    try testing.expectEqual(5, claim.position);
    try testing.expectEqual(7, view.header().head);
}

test "words that contradict each other are called damage, in bounded time" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const view = test_ring.view;
    var opening: u64 = 0;
    var allowed: u64 = 0;
    const words = [_]ring.StateWord{
        .{ .state = .claimed, .span = 0, .owner = 1, .lap = 0 },
        .{ .state = .committed, .span = 257, .owner = 1, .lap = 0 },
        .{ .state = .padding, .span = 511, .owner = 1, .lap = 0 },
        .{ .state = @enumFromInt(15), .span = 1, .owner = 1, .lap = 0 },
        .{ .state = .free, .span = 3, .owner = 0, .lap = 0 },
    };
    for (words) |word| {
        test_ring.startAt(0);
        allowed = 0;
        view.stateWord(0).* = word.bits();
        try testing.expectError(error.Damaged, producer.claim(view, 1, 1, null, &opening, &allowed));
        try testing.expectEqual(0, opening);
    }
    // One that would reach beyond the ring's end.
    test_ring.startAt(1020);
    allowed = 0;
    view.stateWord(1020).* = (ring.StateWord{ .state = .claimed, .span = 5, .owner = 1, .lap = 0 }).bits();
    try testing.expectError(error.Damaged, producer.claim(view, 1, 1, null, &opening, &allowed));
    // Of another lap: not to be had in this one.
    for ([_]ring.StateWord{ ring.StateWord.free(1), .{ .state = .claimed, .span = 1, .owner = 1, .lap = std.math.maxInt(u40) } }) |word| {
        test_ring.startAt(0);
        allowed = 0;
        view.stateWord(0).* = word.bits();
        try testing.expectEqual(1, (try producer.claim(view, 1, 1, null, &opening, &allowed)).position);
    }
    // A head beyond all laps.
    test_ring.startAt(0);
    allowed = 0;
    view.header().head = producer.position_limit;
    try testing.expectError(error.Damaged, producer.claim(view, 1, 1, null, &opening, &allowed));
    // A head beyond the room is the daemon's to mend: the ring looks full meanwhile.
    allowed = 0;
    view.header().head = 5 * ring.slot_count;
    try testing.expectError(error.Full, producer.claim(view, 1, 1, null, &opening, &allowed));
}

test "a route takes a quarter of the ring, the only one three" {
    const test_ring = fake.TestRing.init();
    defer test_ring.deinit();
    const memory = try std.heap.page_allocator.alignedAlloc(u8, .fromByteUnits(std.heap.page_size_min), positions.file_size);
    defer std.heap.page_allocator.free(memory);
    @memset(memory, 0);
    const shared: *positions.Header = @ptrCast(memory.ptr);
    const lines: [*]positions.RoutePositions = @ptrCast(@alignCast(memory.ptr + positions.routes_offset));
    shared.sole_route = positions.no_sole_route;
    const credit = producer.Credit{ .view = .{ .memory = memory }, .route = 5 };
    var opening: u64 = 0;
    var allowed: u64 = 0;
    const view = test_ring.view;

    _ = try producer.claim(view, 1, 200, credit, &opening, &allowed);
    // 200 that the worker has not looked at, which may be ours.
    try testing.expectError(error.Full, producer.claim(view, 1, 57, credit, &opening, &allowed));
    _ = try producer.claim(view, 1, 56, credit, &opening, &allowed);
    // It has looked: 100 of them are.
    shared.scanned = 256;
    lines[5].held_slots = 100;
    _ = try producer.claim(view, 1, 156, credit, &opening, &allowed);
    try testing.expectError(error.Full, producer.claim(view, 1, 1, credit, &opening, &allowed));
    shared.sole_route = 4;
    try testing.expectError(error.Full, producer.claim(view, 1, 1, credit, &opening, &allowed));
    shared.sole_route = 5;
    _ = try producer.claim(view, 1, 100, credit, &opening, &allowed);
    // Room that was seen stays, until it is used up; then the credit is looked at anew.
    lines[5].held_slots = 512;
    _ = try producer.claim(view, 1, 1, credit, &opening, &allowed);
    allowed = 0;
    try testing.expectError(error.Full, producer.claim(view, 1, 1, credit, &opening, &allowed));
    lines[5].held_slots = 510;
    _ = try producer.claim(view, 1, 1, credit, &opening, &allowed);
    // Nonsense from the other side makes it wait, no more.
    shared.sole_route = 4;
    lines[5].held_slots = std.math.maxInt(u32);
    allowed = 0;
    try testing.expectError(error.Full, producer.claim(view, 1, 1, credit, &opening, &allowed));
}
