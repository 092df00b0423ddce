/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The state in transit: chunks, each with a header. The contents of a chunk are made and checked on the way and kept nowhere, so
 * that a gigabyte costs nothing but its transfer.
 */
#ifndef SESSION_H
#define SESSION_H

#include "testdev.h"

#define TD_CHUNK_MAGIC 0x6b6e756863766474ULL
#define TD_PAGE_MAGIC 0x6567617076656474ULL
#define TD_PATTERN 0x9e3779b97f4a7c15ULL
#define TD_STEP 4096
/* Words at the start of each step that tell where it belongs. */
#define TD_WORDS 4

enum td_kind { TD_INITIAL = 1, TD_DIRTY, TD_FILL, TD_FINAL, TD_STATE };

struct td_chunk {
	__le64 magic;
	__le32 kind;
	__le32 number; /* of the chunk in the stream, from 0 */
	__le64 length; /* of what follows the header */
	__le64 reserved;
};

struct td_session {
	/* Taken after td->lock. File operations take this one alone. */
	struct mutex lock;
	struct file *file;
	struct testdev *td;
	bool disabled;
	bool saving;
	bool stopped; /* in STOP_COPY: there will be an end */

	/* The chunk under way, and how much of it, header included, has passed. */
	struct td_chunk chunk;
	u64 passed;
	u32 number;

	/* Of one that saves. */
	bool initial_done, final_done, state_done;
	u64 rounds, reinits;
	bool pause; /* a drain has to be seen before there is more to read */
	bool reinit; /* to be told in the next PRECOPY_INFO */

	/* Of one that loads. */
	bool bad, complete;
	struct td_state state;
};

static inline u64 td_chunk_left(const struct td_session *session)
{
	if (!session->chunk.magic)
		return 0;
	return sizeof(struct td_chunk) + le64_to_cpu(session->chunk.length) - session->passed;
}

/* Word `word` of step `step` of a chunk. */
static inline u64 td_word(const struct td_chunk *chunk, u64 step, unsigned int word)
{
	switch (word) {
	case 0: return TD_PAGE_MAGIC;
	case 1: return (u64)le32_to_cpu(chunk->kind) << 32 | le32_to_cpu(chunk->number);
	case 2: return step;
	case 3: return ~step;
	default: return TD_PATTERN * word;
	}
}

struct td_session *td_session_new(struct testdev *td, bool saving);
extern const struct file_operations td_save_fops, td_load_fops;
u64 td_save_left(struct td_session *session);
int td_load_finish(struct td_session *session);

#endif
