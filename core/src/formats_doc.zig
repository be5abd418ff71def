//! Writes docs/formats.md: the prose stands here, every offset and size comes from the types themselves.
//!
//!     zig run -lc core/src/formats_doc.zig > docs/formats.md
//!
//! A test (in formats_test.zig) fails when the file in docs/ is not what this writes.

const std = @import("std");
const ring = @import("format/ring.zig");
const positions = @import("format/positions.zig");
const routes = @import("format/routes.zig");
const control = @import("format/control.zig");
const wal = @import("format/wal.zig");

const Writer = std.Io.Writer;

pub fn main() !void {
    var buffer: [4096]u8 = undefined;
    var writer = std.fs.File.stdout().writer(&buffer);
    try write(&writer.interface);
    try writer.interface.flush();
}

pub fn write(out: *Writer) Writer.Error!void {
    try out.writeAll(
        \\# Formats
        \\
        \\Every byte that Elgate shares between processes or keeps on disk. All integers are little-endian. The
        \\definitions are the Zig types in `core/src/format/`; this file is written from them by
        \\`core/src/formats_doc.zig`, and a test fails when the two differ. The rules that go with the bytes (who may
        \\write what, in which order) stand in the comments of those files and in [architecture.md](architecture.md).
        \\
        \\Checksums are CRC32C (Castagnoli). A checksum covers its header from the field behind it to the end, but
        \\for the slot header's, which leaves the daemon's own last word out.
        \\
        \\
    );
    try out.print(
        \\## Ring
        \\
        \\`/dev/shm/elgate_ring`, version {d}, {d} bytes: made once with all its memory reserved, kept over restarts
        \\of the daemon.
        \\
        \\```
        \\0          Header                      one page; words that change at run time 128 bytes apart
        \\{d:<10} StateWord   × {d:<4}          {d} bytes each, one per slot
        \\{d:<10} ProducerRow × {d:<4}          {d} bytes each, one per attached thread
        \\{d:<10} Slot        × {d:<4}          {d} bytes each, page-aligned
        \\{d}    end
        \\```
        \\
        \\A place in the ring is a 64-bit position that never wraps: slot index = position mod {d}, lap = position div
        \\{d}. An operation takes a span of 1 to {d} slots: a slot header, then the payload without holes (at most
        \\{d} bytes). A span never crosses the end of the ring; a padding span fills up.
        \\
        \\
    , .{
        ring.version,            ring.file_size,
        ring.state_words_offset, ring.slot_count,
        @sizeOf(u64),            ring.producer_rows_offset,
        ring.producer_rows,      @sizeOf(ring.ProducerRow),
        ring.slots_offset,       ring.slot_count,
        ring.slot_size,          ring.file_size,
        ring.slot_count,         ring.slot_count,
        ring.span_slots_max,     ring.payload_bytes_max,
    });
    try structure(out, "Header", ring.Header);
    try packedStructure(out, "StateWord", ring.StateWord);
    try enumeration(out, "StateWord.state", ring.State);
    try structure(out, "ProducerRow", ring.ProducerRow);
    try structure(out, "SlotHeader", ring.SlotHeader);
    try enumeration(out, "SlotHeader.operation", ring.Operation);
    try out.print(
        \\## Positions
        \\
        \\A sealed memfd per ring, version {d}, {d} bytes: clients can map it for reading only.
        \\
        \\```
        \\0          Header
        \\{d:<10} RoutePositions × {d}
        \\{d:<10} HandleState    × {d}
        \\```
        \\
        \\
    , .{ positions.version, positions.file_size, positions.routes_offset, positions.routes_max, positions.handles_offset, positions.handles_max });
    try structure(out, "Header", positions.Header);
    try structure(out, "RoutePositions", positions.RoutePositions);
    try structure(out, "HandleState", positions.HandleState);
    try enumeration(out, "HandleState.native", positions.Native);
    try out.print(
        \\## Table of routes
        \\
        \\A sealed memfd, version {d}: TableHeader, then `count` entries, then the patterns and names.
        \\
        \\
    , .{routes.version});
    try structure(out, "TableHeader", routes.TableHeader);
    try structure(out, "Entry", routes.Entry);
    try out.print(
        \\## Control messages
        \\
        \\A Unix SOCK_SEQPACKET socket, one message per packet, version {d}, at most {d} bytes. `length_bytes` must be the
        \\packet's own length; a message of another length, magic or kind is refused, counted, and ends the session.
        \\
        \\
    , .{ control.version, control.message_bytes_max });
    try enumeration(out, "MessageHeader.kind", control.Kind);
    try structure(out, "MessageHeader", control.MessageHeader);
    inline for (.{ "Hello", "Welcome", "AttachThread", "ThreadAttached", "RegisterFile", "FileRegistered", "ReleaseFile", "FenceFile", "DrainFile", "ChangeName", "FetchRoutes", "Routes", "Done", "Refused" }) |name| {
        try structure(out, name, @field(control, name));
    }
    try enumeration(out, "ChangeName.change", control.NameChange);
    try enumeration(out, "Refused.refusal", control.Refusal);
    try out.print(
        \\## Log
        \\
        \\`<wal dir>/<route>/<first LSN, 20 digits>-<timestamp>.wal`, version {d}. The names are for people, the headers
        \\are what counts.
        \\
        \\```
        \\segment                                         group (one commit, one durable write)
        \\0      ┌──────────────────────────────┐         0    ┌──────────────────────────┐
        \\       │ SegmentHeader, zero to {d:<5} │              │ GroupHeader              │
        \\{d:<6} ├──────────────────────────────┤         {d:<4} ├──────────────────────────┤
        \\       │ group                        │              │ RecordHeader ({d})        │
        \\       ├──────────────────────────────┤              │ payload, zero to 8       │
        \\       │ group                        │              ├──────────────────────────┤
        \\       ├──────────────────────────────┤              │ RecordHeader …           │
        \\       │ zeros, or what an older life │              ├──────────────────────────┤
        \\       │ of the file left             │              │ zeros to the next {d}   │
        \\size   └──────────────────────────────┘              └──────────────────────────┘
        \\```
        \\
        \\Each group starts on a fresh block of {d} bytes; no block that holds acknowledged records is written again.
        \\
        \\
    , .{ wal.version, wal.block_size, wal.block_size, @sizeOf(wal.GroupHeader), @sizeOf(wal.RecordHeader), wal.block_size, wal.block_size });
    try structure(out, "SegmentHeader", wal.SegmentHeader);
    try structure(out, "GroupHeader", wal.GroupHeader);
    try structure(out, "RecordHeader", wal.RecordHeader);
    try enumeration(out, "RecordHeader.kind", wal.Kind);
    try structure(out, "FileIdentity", wal.FileIdentity);
    try out.writeAll(
        \\`checkpoint` in the same directory: two blocks of 4096 bytes, written in turn; the valid one with the higher
        \\sequence counts.
        \\
        \\
    );
    try structure(out, "Checkpoint", wal.Checkpoint);
    try out.print(
        \\A file under Elgate's care carries the extended attribute `{s}`: there may be more for it in the log.
        \\
        \\
    , .{wal.attribute_name});
    try structure(out, "FileAttribute", wal.FileAttribute);
}

fn structure(out: *Writer, comptime name: []const u8, comptime T: type) Writer.Error!void {
    try out.print("### {s} ({d} bytes)\n\n| offset | bytes | field |\n|---:|---:|---|\n", .{ name, @sizeOf(T) });
    inline for (std.meta.fields(T)) |field| {
        const padding = comptime std.mem.startsWith(u8, field.name, "reserved");
        try out.print("| {d} | {d} | {s} |\n", .{ @offsetOf(T, field.name), @sizeOf(field.type), if (padding) "zero" else "`" ++ field.name ++ "`" });
    }
    try out.writeAll("\n");
}

fn packedStructure(out: *Writer, comptime name: []const u8, comptime T: type) Writer.Error!void {
    try out.print("### {s} ({d} bytes)\n\n| first bit | bits | field |\n|---:|---:|---|\n", .{ name, @sizeOf(T) });
    inline for (std.meta.fields(T)) |field| {
        try out.print("| {d} | {d} | `{s}` |\n", .{ @bitOffsetOf(T, field.name), @bitSizeOf(field.type), field.name });
    }
    try out.writeAll("\n");
}

fn enumeration(out: *Writer, comptime name: []const u8, comptime T: type) Writer.Error!void {
    try out.print("`{s}`: ", .{name});
    inline for (std.meta.fields(T), 0..) |field, i| {
        try out.print("{s}{d} {s}", .{ if (i == 0) "" else ", ", field.value, field.name });
    }
    try out.writeAll(".\n\n");
}
