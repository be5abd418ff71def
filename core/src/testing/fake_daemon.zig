//! A small daemon for tests of the client: a ring in a memfd, a control socket in a directory of its own, one
//! consumer thread that checks every slot and performs the operations on the real files. Nothing it does is durable;
//! it publishes all levels at once. It can be told to misbehave, to stop and to come back as another daemon on the
//! same ring (or on a new one).

const std = @import("std");
const linux = std.os.linux;
const checksum = @import("../format/checksum.zig");
const control = @import("../format/control.zig");
const positions = @import("../format/positions.zig");
const ring = @import("../format/ring.zig");
const routes = @import("../format/routes.zig");
const wal = @import("../format/wal.zig");
const Directory = @import("directory.zig").Directory;

const allocator = std.heap.c_allocator;

pub fn check(result: usize) usize {
    const signed: isize = @bitCast(result);
    if (signed < 0 and signed > -4096) std.debug.panic("system call failed: errno {d}", .{-signed});
    return result;
}

fn futexWake(word: *const u32, count: u31, bits: u32) void {
    _ = linux.futex(word, .{ .cmd = .WAKE_BITSET, .private = false }, count, .{ .timeout = null }, null, bits);
}

// ---- a ring --------------------------------------------------------------------------------------------------------

const pthread_mutexattr_t = extern struct { bytes: [16]u8 align(8) };
extern "c" fn pthread_mutexattr_init(attribute: *pthread_mutexattr_t) c_int;
extern "c" fn pthread_mutexattr_setrobust(attribute: *pthread_mutexattr_t, robust: c_int) c_int;
extern "c" fn pthread_mutexattr_setpshared(attribute: *pthread_mutexattr_t, shared: c_int) c_int;
extern "c" fn pthread_mutex_init(mutex: *anyopaque, attribute: *const pthread_mutexattr_t) c_int;

pub const TestRing = struct {
    fd: i32,
    view: ring.View,

    pub fn init() TestRing {
        const fd: i32 = @intCast(check(linux.memfd_create("elgate-test-ring", linux.MFD.CLOEXEC)));
        _ = check(linux.ftruncate(fd, ring.file_size));
        const address = check(linux.mmap(null, ring.file_size, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED }, fd, 0));
        const view = ring.View{ .memory = @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(address))[0..ring.file_size] };
        const header = view.header();
        header.magic = ring.magic;
        header.slot_count = ring.slot_count;
        header.slot_size = ring.slot_size;
        header.producer_rows = ring.producer_rows;
        header.owner_uid = linux.geteuid();
        std.crypto.random.bytes(&header.uuid);
        for (0..ring.producer_rows) |row| initMutex(view.producerRow(@intCast(row)));
        @atomicStore(u32, &header.version, ring.version, .release);
        return .{ .fd = fd, .view = view };
    }

    /// Both sides start at `position`, which begins a lap's slot like any other.
    pub fn startAt(test_ring: TestRing, position: u64) void {
        const header = test_ring.view.header();
        for (0..ring.slot_count) |offset| {
            const at = position + offset;
            test_ring.view.stateWord(at).* = ring.StateWord.free(ring.lapOf(at)).bits();
        }
        @atomicStore(u64, &header.head, position, .seq_cst);
        @atomicStore(u64, &header.tail, position, .seq_cst);
    }

    pub fn deinit(test_ring: TestRing) void {
        _ = linux.munmap(test_ring.view.memory.ptr, test_ring.view.memory.len);
        _ = linux.close(test_ring.fd);
    }
};

fn initMutex(row: *ring.ProducerRow) void {
    var attribute: pthread_mutexattr_t = undefined;
    _ = pthread_mutexattr_init(&attribute);
    _ = pthread_mutexattr_setrobust(&attribute, 1);
    _ = pthread_mutexattr_setpshared(&attribute, 1);
    if (pthread_mutex_init(&row.mutex, &attribute) != 0) @panic("pthread_mutex_init");
    row.open_claim = 0;
    row.thread_id = 0;
}

fn ownerIsGone(row: *ring.ProducerRow) bool {
    const word = @atomicLoad(u32, @as(*u32, @ptrCast(&row.mutex)), .acquire);
    return word & ring.mutex_owner_died != 0 or word & ring.mutex_thread_id_mask == 0;
}

pub const Record = struct {
    position: u64,
    owner: u32,
    header: ring.SlotHeader,
    payload: []const u8,
};

/// Walks a ring as the worker does, and checks what it finds. One thread.
pub const Consumer = struct {
    view: ring.View,
    tail: u64,
    scan: u64,
    slots: [ring.slot_count]u16 = @splat(0),
    done: [ring.slot_count]bool = @splat(false),
    passed: [ring.slot_count]u64 = undefined,
    passed_count: u32 = 0,
    /// Go on behind an open claim, as soon as there is something behind it.
    passes: bool = true,
    damaged: u64 = 0,
    aborted: u64 = 0,
    padded: u64 = 0,
    passed_total: u64 = 0,

    pub fn init(view: ring.View) Consumer {
        const tail = @atomicLoad(u64, &view.header().tail, .acquire);
        return .{ .view = view, .tail = tail, .scan = tail };
    }

    pub fn poll(consumer: *Consumer, context: anytype, comptime perform: fn (@TypeOf(context), *const Record) void) bool {
        var any = false;
        // Passed ones first: their owners wait, and so does what the same owner sends next.
        var index: u32 = 0;
        while (index < consumer.passed_count) {
            const position = consumer.passed[index];
            const word = consumer.view.loadState(position);
            switch (word.state) {
                .committed_passed => consumer.take(position, word, context, perform),
                .aborted => {},
                else => {
                    if (!consumer.abortIfOrphaned(position, word)) index += 1;
                    continue;
                },
            }
            consumer.done[ring.slotIndex(position)] = true;
            consumer.passed_count -= 1;
            consumer.passed[index] = consumer.passed[consumer.passed_count];
            any = true;
        }
        while (consumer.scan - consumer.tail < ring.slot_count) {
            const position = consumer.scan;
            const word = consumer.view.loadState(position);
            if (word.lap != ring.lapOf(position)) break;
            switch (word.state) {
                .committed, .committed_passed => {
                    consumer.take(position, word, context, perform);
                    consumer.see(position, word, true);
                },
                .padding => {
                    consumer.padded += 1;
                    consumer.see(position, word, true);
                },
                .aborted => consumer.see(position, word, true),
                .claimed, .passed => {
                    if (consumer.abortIfOrphaned(position, word)) continue;
                    if (!consumer.passes) break;
                    const behind = position + word.span;
                    const next = consumer.view.loadState(behind);
                    if (next.lap != ring.lapOf(behind) or next.state == .free) break;
                    if (word.state == .claimed and @cmpxchgStrong(u64, consumer.view.stateWord(position), word.bits(), word.with(.passed).bits(), .seq_cst, .acquire) != null) continue;
                    consumer.passed[consumer.passed_count] = position;
                    consumer.passed_count += 1;
                    consumer.passed_total += 1;
                    consumer.see(position, word, false);
                },
                else => break,
            }
            any = true;
        }
        return any;
    }

    fn see(consumer: *Consumer, position: u64, word: ring.StateWord, done: bool) void {
        consumer.slots[ring.slotIndex(position)] = word.span;
        consumer.done[ring.slotIndex(position)] = done;
        _ = @cmpxchgStrong(u64, &consumer.view.header().head, position, position + word.span, .seq_cst, .monotonic);
        consumer.scan += word.span;
    }

    fn take(consumer: *Consumer, position: u64, word: ring.StateWord, context: anytype, comptime perform: fn (@TypeOf(context), *const Record) void) void {
        const header = consumer.view.slotHeader(position).*;
        const sound = header.computeChecksum() == header.header_checksum and header.position == position and
            header.length_bytes <= ring.payload_bytes_max and ring.spanForLength(header.length_bytes) == word.span and
            checksum.crc32c(0, consumer.view.payload(position, word.span)[0..header.length_bytes]) == header.payload_checksum;
        if (!sound) {
            consumer.damaged += 1;
            return;
        }
        perform(context, &.{
            .position = position,
            .owner = word.owner,
            .header = header,
            .payload = consumer.view.payload(position, word.span)[0..header.length_bytes],
        });
    }

    fn abortIfOrphaned(consumer: *Consumer, position: u64, word: ring.StateWord) bool {
        if (!ownerIsGone(consumer.view.producerRow(word.owner))) return false;
        if (@cmpxchgStrong(u64, consumer.view.stateWord(position), word.bits(), word.with(.aborted).bits(), .seq_cst, .acquire) == null) consumer.aborted += 1;
        return true;
    }

    pub fn release(consumer: *Consumer) void {
        const before = consumer.tail;
        while (consumer.tail < consumer.scan and consumer.done[ring.slotIndex(consumer.tail)]) {
            const span = consumer.slots[ring.slotIndex(consumer.tail)];
            const free = ring.StateWord.free(ring.lapOf(consumer.tail) + 1).bits();
            var offset: u64 = span;
            while (offset > 0) {
                offset -= 1;
                @atomicStore(u64, consumer.view.stateWord(consumer.tail + offset), free, .release);
            }
            consumer.tail += span;
        }
        if (consumer.tail == before) return;
        const header = consumer.view.header();
        @atomicStore(u64, &header.tail, consumer.tail, .seq_cst);
        if (@atomicLoad(u32, &header.space_waiters, .seq_cst) != 0) {
            _ = @atomicRmw(u32, &header.space_sequence, .Add, 1, .seq_cst);
            futexWake(&header.space_sequence, std.math.maxInt(u31), std.math.maxInt(u32));
        }
    }
};

// ---- a daemon ------------------------------------------------------------------------------------------------------

/// What it does wrong when a client says hello.
pub const Fault = enum(u32) {
    none,
    short_answer,
    wrong_magic,
    wrong_version,
    wrong_sequence,
    wrong_kind,
    wrong_length,
    missing_descriptor,
    surplus_descriptors,
    hang_up,
    false_ring_size,
    false_ring_uuid,
    false_positions,
    false_routes,
};

pub const RouteSpec = struct {
    name: []const u8,
    pattern: []const u8,
    flags: routes.Flags = .{},
};

const Known = struct {
    file_id: u64,
    inode: u64,
    fd: i32,
};

const Handle = struct {
    session: u64 = 0,
    file_id: u64 = 0,
};

pub const FakeDaemon = struct {
    directory: Directory,
    socket_path: [96:0]u8,
    ring: TestRing,
    rings_before: std.ArrayListUnmanaged(TestRing) = .empty,
    consumer: Consumer,

    mutex: std.Thread.Mutex = .{},
    specs: []const RouteSpec,
    /// Added to a route's place in `specs`: another daemon counts otherwise.
    first_route: u32 = 0,
    routes_generation: u32 = 1,
    epoch: u64 = 0,
    positions_fd: i32 = -1,
    positions_memory: []align(std.heap.page_size_min) u8 = &.{},
    known: std.ArrayListUnmanaged(Known) = .empty,
    /// Positions of this ring that were performed, as a log remembers them: behind an open claim a slot is not
    /// released, and the next daemon meets its record again.
    performed: std.AutoHashMapUnmanaged(u64, void) = .empty,
    handles: [256]Handle = @splat(.{}),
    rows: [ring.producer_rows]u64 = @splat(0),
    next_session: u64 = 1,
    /// Below this position, records may carry the handles of an earlier daemon.
    recovery_head: u64 = 0,

    listener: i32 = -1,
    accept_thread: ?std.Thread = null,
    consumer_thread: ?std.Thread = null,
    session_threads: std.ArrayListUnmanaged(std.Thread) = .empty,
    session_fds: std.ArrayListUnmanaged(i32) = .empty,
    stopping: bool = false,

    // What tests turn. Atomic.
    fault: Fault = .none,
    refuse: u32 = 0,
    paused: bool = false,

    // What tests look at. Under `mutex`.
    records: u64 = 0,
    rejected: u64 = 0,
    truncates: u64 = 0,
    barriers: u64 = 0,
    fences: u64 = 0,
    fence_reason: u32 = 0,
    registrations: u64 = 0,
    releases: u64 = 0,
    drains: u64 = 0,
    names_moved: u64 = 0,
    names_removed: u64 = 0,
    last_name: [control.name_bytes_max + 1]u8 = @splat(0),
    last_name_length: u32 = 0,
    attachments: u64 = 0,

    pub fn start(specs: []const RouteSpec) *FakeDaemon {
        const daemon = allocator.create(FakeDaemon) catch @panic("memory");
        const test_ring = TestRing.init();
        daemon.* = .{
            .directory = Directory.make(),
            .socket_path = undefined,
            .ring = test_ring,
            .consumer = Consumer.init(test_ring.view),
            .specs = specs,
        };
        _ = std.fmt.bufPrintZ(&daemon.socket_path, "{s}/control.sock", .{daemon.directoryText()}) catch unreachable;
        daemon.serve();
        return daemon;
    }

    pub fn directoryText(daemon: *const FakeDaemon) []const u8 {
        return daemon.directory.text();
    }

    pub fn socketText(daemon: *const FakeDaemon) [:0]const u8 {
        return std.mem.sliceTo(&daemon.socket_path, 0);
    }

    pub fn destroy(daemon: *FakeDaemon) void {
        if (daemon.listener >= 0) daemon.die();
        for (daemon.known.items) |known| _ = linux.close(known.fd);
        daemon.known.deinit(allocator);
        daemon.performed.deinit(allocator);
        daemon.ring.deinit();
        for (daemon.rings_before.items) |before| before.deinit();
        daemon.rings_before.deinit(allocator);
        daemon.directory.remove();
        allocator.destroy(daemon);
    }

    /// Begins to serve, as a daemon that has just been started on this ring.
    pub fn serve(daemon: *FakeDaemon) void {
        daemon.stopping = false;
        daemon.epoch = std.crypto.random.int(u64) | 1;
        daemon.handles = @splat(.{});
        daemon.rows = @splat(0);
        for (0..ring.producer_rows) |row| @atomicStore(u64, &daemon.ring.view.producerRow(@intCast(row)).session, 0, .seq_cst);
        daemon.recovery_head = @atomicLoad(u64, &daemon.ring.view.header().head, .seq_cst);
        daemon.consumer = Consumer.init(daemon.ring.view);
        daemon.next_session = std.crypto.random.int(u32);

        daemon.positions_fd = @intCast(check(linux.memfd_create("elgate-test-positions", linux.MFD.CLOEXEC)));
        _ = check(linux.ftruncate(daemon.positions_fd, positions.file_size));
        const address = check(linux.mmap(null, positions.file_size, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED }, daemon.positions_fd, 0));
        daemon.positions_memory = @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(address))[0..positions.file_size];
        const header = daemon.positionsHeader();
        header.magic = positions.magic;
        header.version = positions.version;
        header.daemon_epoch = daemon.epoch;
        header.routes_generation = daemon.routes_generation;
        header.sole_route = positions.no_sole_route;
        header.server[0] = 1; // whose thread it says it is does not matter

        const made: i32 = @intCast(check(linux.socket(linux.AF.UNIX, linux.SOCK.SEQPACKET | linux.SOCK.CLOEXEC, 0)));
        var name = linux.sockaddr.un{ .path = @splat(0) };
        const path = daemon.socketText();
        @memcpy(name.path[0..path.len], path);
        _ = linux.unlink(path);
        _ = check(linux.bind(made, @ptrCast(&name), @sizeOf(linux.sockaddr.un)));
        // What the ring holds is taken over before anybody is let in.
        daemon.consumer_thread = std.Thread.spawn(.{}, consume, .{daemon}) catch @panic("thread");
        _ = check(linux.listen(made, 64));
        daemon.listener = made;
        daemon.accept_thread = std.Thread.spawn(.{}, acceptAll, .{ daemon, made }) catch @panic("thread");
    }

    /// As SIGKILL: everything it had is gone but the ring and the files that its log knows.
    pub fn die(daemon: *FakeDaemon) void {
        @atomicStore(bool, &daemon.stopping, true, .seq_cst);
        _ = linux.shutdown(daemon.listener, linux.SHUT.RDWR);
        daemon.accept_thread.?.join();
        _ = linux.close(daemon.listener);
        daemon.listener = -1;
        _ = linux.unlink(daemon.socketText());
        daemon.wakeConsumer();
        daemon.consumer_thread.?.join();
        daemon.mutex.lock();
        for (daemon.session_fds.items) |fd| _ = linux.shutdown(fd, linux.SHUT.RDWR);
        daemon.mutex.unlock();
        for (daemon.session_threads.items) |thread| thread.join();
        daemon.session_threads.clearAndFree(allocator);
        for (daemon.session_fds.items) |fd| _ = linux.close(fd);
        daemon.session_fds.clearAndFree(allocator);
        @atomicStore(u32, @as(*u32, @ptrCast(&daemon.positionsHeader().server)), 1 << 30, .seq_cst); // as the kernel does
        _ = linux.munmap(daemon.positions_memory.ptr, daemon.positions_memory.len);
        _ = linux.close(daemon.positions_fd);
    }

    /// As when all is below a checkpoint and nobody has it open. Only while dead.
    pub fn forgetFiles(daemon: *FakeDaemon) void {
        for (daemon.known.items) |known| _ = linux.close(known.fd);
        daemon.known.clearRetainingCapacity();
    }

    /// The ring is gone, as from a cleared /dev/shm. Only while dead.
    pub fn loseRing(daemon: *FakeDaemon) void {
        daemon.rings_before.append(allocator, daemon.ring) catch @panic("memory");
        daemon.ring = TestRing.init();
        daemon.performed.clearAndFree(allocator);
    }

    pub fn pause(daemon: *FakeDaemon, paused: bool) void {
        @atomicStore(bool, &daemon.paused, paused, .seq_cst);
        daemon.wakeConsumer();
        if (!paused) return;
        // Once through the lock: the consumer has seen it.
        daemon.mutex.lock();
        daemon.mutex.unlock();
    }

    /// As a reload of the configuration.
    pub fn setRoutes(daemon: *FakeDaemon, specs: []const RouteSpec) void {
        daemon.mutex.lock();
        defer daemon.mutex.unlock();
        daemon.specs = specs;
        daemon.routes_generation += 1;
        @atomicStore(u32, &daemon.positionsHeader().routes_generation, daemon.routes_generation, .seq_cst);
    }

    pub fn reportError(daemon: *FakeDaemon, handle: u32, errno: i32) void {
        const state = daemon.handleState(handle);
        @atomicStore(i32, &state.error_errno, errno, .release);
        _ = @atomicRmw(u32, &state.error_sequence, .Add, 1, .seq_cst);
    }

    /// Of the handle that was given out last.
    pub fn lastHandle(daemon: *FakeDaemon) u32 {
        daemon.mutex.lock();
        defer daemon.mutex.unlock();
        return @intCast((daemon.registrations - 1) % daemon.handles.len);
    }

    /// The new name that was announced last.
    pub fn lastName(daemon: *FakeDaemon, buffer: *[control.name_bytes_max + 1]u8) []const u8 {
        daemon.mutex.lock();
        defer daemon.mutex.unlock();
        buffer.* = daemon.last_name;
        return buffer[0..daemon.last_name_length];
    }

    pub fn positionsHeader(daemon: *FakeDaemon) *positions.Header {
        return @ptrCast(daemon.positions_memory.ptr);
    }

    pub fn routePositions(daemon: *FakeDaemon, index: u32) *positions.RoutePositions {
        const lines: [*]positions.RoutePositions = @ptrCast(@alignCast(daemon.positions_memory.ptr + positions.routes_offset));
        return &lines[index];
    }

    pub fn handleState(daemon: *FakeDaemon, index: u32) *positions.HandleState {
        const states: [*]positions.HandleState = @ptrCast(@alignCast(daemon.positions_memory.ptr + positions.handles_offset));
        return &states[index];
    }

    pub fn count(daemon: *FakeDaemon, comptime field: []const u8) u64 {
        daemon.mutex.lock();
        defer daemon.mutex.unlock();
        return @field(daemon, field);
    }

    /// Of what its consumer counts.
    pub fn consumed(daemon: *FakeDaemon, comptime field: []const u8) u64 {
        daemon.mutex.lock();
        defer daemon.mutex.unlock();
        return @field(daemon.consumer, field);
    }

    // ---- consumer thread

    fn wakeConsumer(daemon: *FakeDaemon) void {
        const doorbell = &daemon.ring.view.header().doorbell;
        @atomicStore(u32, doorbell, 0, .seq_cst);
        futexWake(doorbell, 1, std.math.maxInt(u32));
    }

    fn consume(daemon: *FakeDaemon) void {
        const doorbell = &daemon.ring.view.header().doorbell;
        while (!@atomicLoad(bool, &daemon.stopping, .seq_cst)) {
            if (daemon.round()) continue;
            @atomicStore(u32, doorbell, 1, .seq_cst);
            if (daemon.round()) {
                @atomicStore(u32, doorbell, 0, .seq_cst);
                continue;
            }
            const limit = linux.timespec{ .sec = 0, .nsec = 20 * std.time.ns_per_ms };
            _ = linux.futex_4arg(doorbell, .{ .cmd = .WAIT, .private = false }, 1, &limit);
            @atomicStore(u32, doorbell, 0, .seq_cst);
        }
        @atomicStore(u32, doorbell, 0, .seq_cst);
    }

    fn round(daemon: *FakeDaemon) bool {
        daemon.mutex.lock();
        defer daemon.mutex.unlock();
        if (@atomicLoad(bool, &daemon.paused, .seq_cst)) return false;
        const any = daemon.consumer.poll(daemon, perform);
        if (!any) return false;
        daemon.publish();
        daemon.consumer.release();
        return true;
    }

    fn publish(daemon: *FakeDaemon) void {
        const scan = daemon.consumer.scan;
        @atomicStore(u64, &daemon.positionsHeader().scanned, scan, .release);
        for (0..daemon.specs.len) |index| {
            const line = daemon.routePositions(daemon.first_route + @as(u32, @intCast(index)));
            const before = line.applied;
            @atomicStore(u64, &line.logged, scan, .release);
            @atomicStore(u64, &line.durable, scan, .release);
            @atomicStore(u64, &line.applied, scan, .release);
            _ = @atomicRmw(u32, &line.generation, .Add, 1, .seq_cst);
            futexWake(&line.generation, std.math.maxInt(u31), positions.wakeMask(before, scan));
        }
    }

    fn perform(daemon: *FakeDaemon, record: *const Record) void {
        const header = &record.header;
        const known_position = daemon.performed.getOrPut(allocator, record.position) catch @panic("memory");
        if (known_position.found_existing) return;
        if (record.position >= daemon.recovery_head) {
            const handle = if (header.handle < daemon.handles.len) daemon.handles[header.handle] else Handle{};
            if (handle.session == 0 or handle.session != daemon.rows[record.owner] or handle.file_id != header.file_id) {
                daemon.rejected += 1;
                return;
            }
        }
        const fd = for (daemon.known.items) |known| {
            if (known.file_id == header.file_id) break known.fd;
        } else {
            daemon.rejected += 1;
            return;
        };
        daemon.records += 1;
        const operation: ring.Operation = @enumFromInt(header.operation);
        switch (operation) {
            .write => writeAll(fd, record.payload, header.offset),
            .append => {
                const end: u64 = @bitCast(statusOf(fd).size);
                writeAll(fd, record.payload, end);
                if (record.position >= daemon.recovery_head) {
                    @atomicStore(u64, &daemon.handleState(header.handle).append_end, end + record.payload.len, .release);
                }
            },
            .truncate => {
                daemon.truncates += 1;
                _ = check(linux.ftruncate(fd, @intCast(header.offset)));
            },
            .allocate => {
                const result: isize = @bitCast(linux.fallocate(fd, @bitCast(header.argument), @intCast(header.offset), @intCast(header.time_ns)));
                if (result < 0) daemon.reportError(header.handle, @intCast(-result));
            },
            .barrier => daemon.barriers += 1,
            _ => daemon.rejected += 1,
        }
    }

    fn writeAll(fd: i32, bytes: []const u8, offset: u64) void {
        const written = check(linux.pwrite(fd, bytes.ptr, bytes.len, @intCast(offset)));
        if (written != bytes.len) @panic("short write");
    }

    fn statusOf(fd: i32) linux.Stat {
        var status: linux.Stat = undefined;
        _ = check(linux.fstat(fd, &status));
        return status;
    }

    // ---- control threads

    fn acceptAll(daemon: *FakeDaemon, listener: i32) void {
        while (true) {
            const accepted = linux.accept4(listener, null, null, linux.SOCK.CLOEXEC);
            const signed: isize = @bitCast(accepted);
            if (signed < 0) {
                if (-signed == @intFromEnum(linux.E.INTR)) continue;
                return;
            }
            daemon.mutex.lock();
            defer daemon.mutex.unlock();
            const fd: i32 = @intCast(accepted);
            daemon.session_fds.append(allocator, fd) catch @panic("memory");
            const thread = std.Thread.spawn(.{}, serveSession, .{ daemon, fd }) catch @panic("thread");
            daemon.session_threads.append(allocator, thread) catch @panic("memory");
        }
    }

    fn serveSession(daemon: *FakeDaemon, fd: i32) void {
        const id = id: {
            daemon.mutex.lock();
            defer daemon.mutex.unlock();
            daemon.next_session += 1;
            break :id daemon.next_session;
        };
        while (true) {
            var request: [control.message_bytes_max]u8 align(8) = undefined;
            var passed: i32 = -1;
            const length = receive(fd, &request, &passed) orelse break;
            if (length < @sizeOf(control.MessageHeader)) break;
            const header: *const control.MessageHeader = @ptrCast(&request);
            const goes_on = daemon.answer(fd, id, header, &request, passed);
            if (!goes_on) break;
        }
        _ = linux.shutdown(fd, linux.SHUT.RDWR);
        if (@atomicLoad(bool, &daemon.stopping, .seq_cst)) return;
        // What it had sent before is taken first, then its rows and handles go.
        for (&daemon.rows, 0..) |*row, index| {
            if (@atomicLoad(u64, row, .seq_cst) == id) @atomicStore(u64, &daemon.ring.view.producerRow(@intCast(index)).session, 0, .seq_cst);
        }
        daemon.awaitScan();
        daemon.mutex.lock();
        defer daemon.mutex.unlock();
        for (&daemon.rows) |*row| {
            // One whose thread lives on is not lent again.
            if (row.* == id) @atomicStore(u64, row, std.math.maxInt(u64), .seq_cst);
        }
        for (&daemon.handles) |*handle| {
            if (handle.session == id) handle.* = .{};
        }
    }

    fn answer(daemon: *FakeDaemon, fd: i32, id: u64, header: *const control.MessageHeader, request: *align(8) const [control.message_bytes_max]u8, passed: i32) bool {
        const kind: control.Kind = @enumFromInt(header.kind);
        switch (kind) {
            .hello => {
                if (passed >= 0) _ = linux.close(passed); // the ring that it had: this daemon has its own
                return daemon.welcome(fd, id, header);
            },
            .attach_thread => {
                daemon.mutex.lock();
                defer daemon.mutex.unlock();
                daemon.attachments += 1;
                for (&daemon.rows, 0..) |*row, index| {
                    const entry = daemon.ring.view.producerRow(@intCast(index));
                    if (row.* != 0 or !ownerIsGone(entry)) continue;
                    initMutex(entry);
                    @atomicStore(u64, row, id, .seq_cst);
                    @atomicStore(u64, &entry.session, ring.lease(daemon.epoch, id), .seq_cst);
                    reply(fd, control.ThreadAttached, .thread_attached, header.sequence, .{ .header = undefined, .row = @intCast(index), .reserved = 0 }, &.{});
                    return true;
                }
                refusal(fd, header.sequence, .limit_reached, @intFromEnum(linux.E.AGAIN));
                return true;
            },
            .register_file => {
                daemon.mutex.lock();
                defer daemon.mutex.unlock();
                if (passed < 0) @panic("register_file without a descriptor");
                const refuse = @atomicLoad(u32, &daemon.refuse, .seq_cst);
                const matched = if (refuse == 0) daemon.routeOf(passed) else null;
                const route = matched orelse {
                    _ = linux.close(passed);
                    refusal(fd, header.sequence, if (refuse != 0) @enumFromInt(refuse) else .not_on_a_route, 0);
                    return true;
                };
                const file_id = daemon.know(passed);
                const index: u32 = @intCast(daemon.registrations % daemon.handles.len);
                daemon.registrations += 1;
                daemon.handles[index] = .{ .session = id, .file_id = file_id };
                const state = daemon.handleState(index);
                @atomicStore(i32, &state.error_errno, 0, .release);
                @atomicStore(u64, &state.append_end, 0, .release);
                @atomicStore(positions.Native, &state.native, .routed, .release);
                @atomicStore(i32, &state.failed_errno, 0, .release);
                @atomicStore(u32, &state.file_handles, 2, .release); // as if shared: an fsync is a barrier, unless a test says otherwise
                reply(fd, control.FileRegistered, .file_registered, header.sequence, .{ .header = undefined, .file_id = file_id, .handle = index, .route = route }, &.{});
                return true;
            },
            .release_file => {
                const message: *const control.ReleaseFile = @ptrCast(request);
                daemon.awaitScan();
                daemon.mutex.lock();
                defer daemon.mutex.unlock();
                if (message.handle >= daemon.handles.len or daemon.handles[message.handle].session != id) {
                    refusal(fd, header.sequence, .unknown_handle, 0);
                    return true;
                }
                daemon.handles[message.handle] = .{};
                daemon.releases += 1;
                reply(fd, control.Done, .file_released, header.sequence, .{ .header = undefined }, &.{});
                return true;
            },
            .fence_file => {
                const message: *const control.FenceFile = @ptrCast(request);
                daemon.awaitScan();
                daemon.mutex.lock();
                defer daemon.mutex.unlock();
                daemon.fences += 1;
                daemon.fence_reason = message.reason;
                for (daemon.handles, 0..) |handle, index| {
                    if (handle.file_id == message.file_id) @atomicStore(positions.Native, &daemon.handleState(@intCast(index)).native, .native, .seq_cst);
                }
                reply(fd, control.Done, .file_fenced, header.sequence, .{ .header = undefined }, &.{});
                return true;
            },
            .drain_file => {
                if (passed < 0) @panic("drain_file without a descriptor");
                _ = linux.close(passed);
                daemon.awaitScan();
                daemon.mutex.lock();
                defer daemon.mutex.unlock();
                daemon.drains += 1;
                reply(fd, control.Done, .file_drained, header.sequence, .{ .header = undefined }, &.{});
                return true;
            },
            .change_name => {
                const message: *const control.ChangeName = @ptrCast(request);
                if (passed < 0) @panic("change_name without a descriptor");
                _ = linux.close(passed);
                daemon.mutex.lock();
                defer daemon.mutex.unlock();
                const refuse = @atomicLoad(u32, &daemon.refuse, .seq_cst);
                if (refuse != 0) {
                    refusal(fd, header.sequence, @enumFromInt(refuse), @intFromEnum(linux.E.NOSPC));
                    return true;
                }
                switch (message.change) {
                    .moved => daemon.names_moved += 1,
                    .removed => daemon.names_removed += 1,
                    _ => @panic("change_name of an unknown kind"),
                }
                daemon.last_name_length = message.name_length;
                daemon.last_name = message.name;
                reply(fd, control.Done, .name_noted, header.sequence, .{ .header = undefined }, &.{});
                return true;
            },
            .fetch_routes => {
                daemon.mutex.lock();
                defer daemon.mutex.unlock();
                const table = daemon.routeTable();
                defer _ = linux.close(table.fd);
                reply(fd, control.Routes, .routes, header.sequence, .{ .header = undefined, .routes_bytes = table.bytes }, &.{table.fd});
                return true;
            },
            else => return false,
        }
    }

    /// Until everything that is in the ring now has been taken, open claims included.
    pub fn awaitScan(daemon: *FakeDaemon) void {
        const head = @atomicLoad(u64, &daemon.ring.view.header().head, .seq_cst);
        while (!@atomicLoad(bool, &daemon.stopping, .seq_cst)) {
            daemon.mutex.lock();
            const behind = daemon.consumer.scan >= head and daemon.consumer.passed_count == 0;
            daemon.mutex.unlock();
            if (behind) return;
            std.Thread.yield() catch {};
        }
    }

    fn routeOf(daemon: *FakeDaemon, fd: i32) ?u32 {
        var link: [64]u8 = undefined;
        const name = std.fmt.bufPrintZ(&link, "/proc/self/fd/{d}", .{fd}) catch unreachable;
        var buffer: [4096]u8 = undefined;
        const path = buffer[0..check(linux.readlink(name, &buffer, buffer.len))];
        const directory = daemon.directoryText();
        if (!std.mem.startsWith(u8, path, directory)) return null;
        for (daemon.specs, daemon.first_route..) |spec, route| {
            if (routes.globMatches(spec.pattern, path[directory.len..])) return @intCast(route);
        }
        return null;
    }

    fn know(daemon: *FakeDaemon, fd: i32) u64 {
        const inode = statusOf(fd).ino;
        for (daemon.known.items) |known| {
            if (known.inode != inode) continue;
            _ = linux.close(fd);
            return known.file_id;
        }
        const file_id = std.crypto.random.int(u64) | 1;
        // Without O_APPEND, which would move every write to the end.
        var link: [64]u8 = undefined;
        const name = std.fmt.bufPrintZ(&link, "/proc/self/fd/{d}", .{fd}) catch unreachable;
        const own: i32 = @intCast(check(linux.open(name, .{ .ACCMODE = .WRONLY, .CLOEXEC = true }, 0)));
        _ = linux.close(fd);
        const attribute = wal.FileAttribute{ .magic = wal.attribute_magic, .version = wal.version, .log_uuid = @splat(7), .file_id = file_id };
        _ = check(linux.fsetxattr(own, wal.attribute_name, std.mem.asBytes(&attribute), @sizeOf(wal.FileAttribute), 0));
        _ = @atomicRmw(u32, &daemon.positionsHeader().marks_generation, .Add, 1, .seq_cst);
        daemon.known.append(allocator, .{ .file_id = file_id, .inode = inode, .fd = own }) catch @panic("memory");
        return file_id;
    }

    fn welcome(daemon: *FakeDaemon, fd: i32, id: u64, header: *const control.MessageHeader) bool {
        daemon.mutex.lock();
        defer daemon.mutex.unlock();
        const fault = @atomicLoad(Fault, &daemon.fault, .seq_cst);
        if (fault == .hang_up) return false;
        const table = daemon.routeTable();
        defer _ = linux.close(table.fd);
        const other: i32 = @intCast(check(linux.memfd_create("elgate-test-garbage", linux.MFD.CLOEXEC)));
        defer _ = linux.close(other);
        const other_bytes: u64 = if (fault == .false_ring_size) 4096 else if (fault == .false_positions) positions.file_size else table.bytes;
        _ = check(linux.ftruncate(other, @intCast(other_bytes)));

        var message = control.Welcome{
            .header = .{
                .magic = control.magic,
                .version = control.version,
                .kind = @intFromEnum(control.Kind.welcome),
                .length_bytes = @sizeOf(control.Welcome),
                .sequence = header.sequence,
            },
            .session = id,
            .ring_uuid = daemon.ring.view.header().uuid,
            .ring_bytes = ring.file_size,
            .positions_bytes = positions.file_size,
            .routes_bytes = table.bytes,
            .daemon_epoch = daemon.epoch,
            .test_stub = 0,
            .reserved = 0,
        };
        var descriptors = [_]i32{ daemon.ring.fd, daemon.positions_fd, table.fd, other, other, other, other, other, other, other };
        var descriptor_count: usize = 3;
        var length: usize = @sizeOf(control.Welcome);
        switch (fault) {
            .none, .hang_up => {},
            .short_answer => length = @sizeOf(control.MessageHeader) - 4,
            .wrong_magic => message.header.magic += 1,
            .wrong_version => message.header.version += 1,
            .wrong_sequence => message.header.sequence += 1,
            .wrong_kind => message.header.kind = @intFromEnum(control.Kind.routes),
            .wrong_length => message.header.length_bytes -= 8,
            .missing_descriptor => descriptor_count = 2,
            .surplus_descriptors => descriptor_count = 10,
            .false_ring_size => descriptors[0] = other,
            .false_ring_uuid => message.ring_uuid[0] +%= 1,
            .false_positions => descriptors[1] = other,
            .false_routes => descriptors[2] = other,
        }
        send(fd, std.mem.asBytes(&message)[0..length], descriptors[0..descriptor_count]);
        return true;
    }

    const TableFile = struct { fd: i32, bytes: u64 };

    fn routeTable(daemon: *FakeDaemon) TableFile {
        var bytes: [4096]u8 align(8) = @splat(0);
        var used: u32 = @intCast(@sizeOf(routes.TableHeader) + daemon.specs.len * @sizeOf(routes.Entry));
        const entries: [*]routes.Entry = @ptrCast(@alignCast(bytes[@sizeOf(routes.TableHeader)..].ptr));
        for (daemon.specs, 0..) |spec, index| {
            entries[index] = .{
                .route = daemon.first_route + @as(u32, @intCast(index)),
                .flags = spec.flags,
                .pattern_offset = used,
                .pattern_length = @intCast(daemon.directoryText().len + spec.pattern.len),
                .name_offset = used + @as(u32, @intCast(daemon.directoryText().len + spec.pattern.len)),
                .name_length = @intCast(spec.name.len),
                .reserved = 0,
            };
            for ([_][]const u8{ daemon.directoryText(), spec.pattern, spec.name }) |text| {
                @memcpy(bytes[used..][0..text.len], text);
                used += @intCast(text.len);
            }
        }
        const header: *routes.TableHeader = @ptrCast(&bytes);
        header.* = .{
            .magic = routes.magic,
            .version = routes.version,
            .count = @intCast(daemon.specs.len),
            .generation = daemon.routes_generation,
            .reserved = 0,
            .total_bytes = used,
        };
        const fd: i32 = @intCast(check(linux.memfd_create("elgate-test-routes", linux.MFD.CLOEXEC)));
        writeAll(fd, bytes[0..used], 0);
        return .{ .fd = fd, .bytes = used };
    }

    fn reply(fd: i32, comptime Message: type, kind: control.Kind, sequence: u32, fields: Message, descriptors: []const i32) void {
        var message = fields;
        message.header = .{
            .magic = control.magic,
            .version = control.version,
            .kind = @intFromEnum(kind),
            .length_bytes = @sizeOf(Message),
            .sequence = sequence,
        };
        send(fd, std.mem.asBytes(&message), descriptors);
    }

    fn refusal(fd: i32, sequence: u32, reason: control.Refusal, errno: i32) void {
        reply(fd, control.Refused, .refused, sequence, .{ .header = undefined, .refusal = reason, .errno = errno }, &.{});
    }
};

const ControlHeader = extern struct { length: usize, level: i32, kind: i32 };

fn send(fd: i32, bytes: []const u8, descriptors: []const i32) void {
    var rights: extern struct { header: ControlHeader, descriptors: [16]i32 } = undefined;
    rights.header = .{ .length = @sizeOf(ControlHeader) + descriptors.len * @sizeOf(i32), .level = linux.SOL.SOCKET, .kind = 1 };
    @memcpy(rights.descriptors[0..descriptors.len], descriptors);
    const vector = [1]std.posix.iovec_const{.{ .base = bytes.ptr, .len = bytes.len }};
    const message = linux.msghdr_const{
        .name = null,
        .namelen = 0,
        .iov = &vector,
        .iovlen = 1,
        .control = if (descriptors.len == 0) null else &rights,
        .controllen = if (descriptors.len == 0) 0 else std.mem.alignForward(usize, rights.header.length, 8),
        .flags = 0,
    };
    _ = linux.sendmsg(fd, &message, linux.MSG.NOSIGNAL); // the client may be gone
}

fn receive(fd: i32, bytes: []u8, passed: *i32) ?usize {
    var rights: extern struct { header: ControlHeader, descriptors: [4]i32 } = undefined;
    var vector = [1]std.posix.iovec{.{ .base = bytes.ptr, .len = bytes.len }};
    var message = linux.msghdr{ .name = null, .namelen = 0, .iov = &vector, .iovlen = 1, .control = &rights, .controllen = @sizeOf(@TypeOf(rights)), .flags = 0 };
    while (true) {
        const result = linux.recvmsg(fd, &message, linux.MSG.CMSG_CLOEXEC);
        const signed: isize = @bitCast(result);
        if (signed == -@as(isize, @intFromEnum(linux.E.INTR))) continue;
        if (signed <= 0) return null;
        if (message.controllen > 0) {
            passed.* = rights.descriptors[0];
            const count = (rights.header.length - @sizeOf(ControlHeader)) / @sizeOf(i32);
            for (rights.descriptors[1..count]) |other| _ = linux.close(other);
        }
        return result;
    }
}
