/* What the clients of the peers that live inside a program (SQLite, RocksDB) have in common: loops that append one
 * record after the other, each acknowledged after its sync, for as long as standard input says.
 *
 * One order is one line, "CLIENTS START_NS UNTIL_NS SAMPLES_PATH": so many threads begin at START_NS and end at
 * UNTIL_NS (CLOCK_MONOTONIC). The answer is one line with the number of records; the duration of each, in
 * nanoseconds, goes to SAMPLES_PATH as 64-bit integers. The program ends with its input.
 */
#ifndef PEER_CLIENT_H
#define PEER_CLIENT_H

#include <stdint.h>
#include <stdnoreturn.h>

enum { PAYLOAD_BYTES = 128, CLIENTS_MAX = 64 };

extern const char payload[PAYLOAD_BYTES];

/* Appends the next record of client number `client`; returns when it is durable. Called by that client's thread. */
void append_record(unsigned client);

/* Says that it is ready, and carries out orders until the input ends. */
int serve(void);

/* Ends the program with a message on stderr. */
noreturn void fail(const char *what, const char *why);

#endif
