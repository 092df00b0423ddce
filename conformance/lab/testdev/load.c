// SPDX-License-Identifier: GPL-2.0-only
/* Writing the device's state. The contents are checked as they come: where each step belongs, and one word more, another in each. */
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "session.h"

/* Compares word `word` of step `step` if `count` bytes from `at` on hold it whole. */
static int check_word(struct td_session *session, const char __user *from, u64 at, size_t count, u64 step, unsigned int word)
{
	u64 where = step * TD_STEP + word * 8, found;

	if (where < at || where + 8 > at + count)
		return 0;
	if (copy_from_user(&found, from + (where - at), 8))
		return -EFAULT;
	if (found != td_word(&session->chunk, step, word)) {
		td_count(session->td, TD_C_STATE_BAD);
		session->bad = true;
	} else {
		td_count(session->td, TD_C_STATE_GOOD);
	}
	return 0;
}

static int check_contents(struct td_session *session, const char __user *from, u64 at, size_t count)
{
	for (u64 step = at / TD_STEP; step * TD_STEP < at + count; step++) {
		unsigned int more = TD_WORDS + step % (TD_STEP / 8 - TD_WORDS);

		for (unsigned int word = 0; word < TD_WORDS; word++)
			if (check_word(session, from, at, count, step, word))
				return -EFAULT;
		if (check_word(session, from, at, count, step, more))
			return -EFAULT;
	}
	return 0;
}

static int check_header(struct td_session *session)
{
	const struct td_chunk *chunk = &session->chunk;
	u32 kind = le32_to_cpu(chunk->kind);

	if (le64_to_cpu(chunk->magic) != TD_CHUNK_MAGIC || kind < TD_INITIAL || kind > TD_STATE ||
	    le32_to_cpu(chunk->number) != session->number || chunk->reserved || session->complete)
		return -EINVAL;
	if (kind == TD_STATE && le64_to_cpu(chunk->length) != sizeof(struct td_state))
		return -EINVAL;
	session->number++;
	return 0;
}

static void end_chunk(struct td_session *session)
{
	u64 ms = session->td->parameters.load_initial_ms;

	switch (le32_to_cpu(session->chunk.kind)) {
	case TD_INITIAL:
		if (ms)
			msleep_interruptible(ms);
		break;
	case TD_STATE:
		session->complete = true;
		break;
	}
	session->passed = 0;
}

/* Takes up to `count` bytes. */
static ssize_t take(struct td_session *session, const char __user *from, size_t count)
{
	u64 at, length;
	int error;

	if (session->passed < sizeof(session->chunk)) {
		count = min_t(u64, count, sizeof(session->chunk) - session->passed);
		if (copy_from_user((u8 *)&session->chunk + session->passed, from, count))
			return -EFAULT;
		session->passed += count;
		if (session->passed == sizeof(session->chunk)) {
			error = check_header(session);
			if (error)
				return error;
		}
		return count;
	}
	at = session->passed - sizeof(session->chunk);
	length = le64_to_cpu(session->chunk.length);
	count = min_t(u64, count, length - at);
	if (session->chunk.kind == cpu_to_le32(TD_STATE))
		error = copy_from_user((u8 *)&session->state + at, from, count) ? -EFAULT : 0;
	else
		error = check_contents(session, from, at, count);
	if (error)
		return error;
	session->passed += count;
	if (session->passed == sizeof(session->chunk) + length)
		end_chunk(session);
	return count;
}

static ssize_t load_write(struct file *file, const char __user *buf, size_t count, loff_t *ppos)
{
	struct td_session *session = file->private_data;
	ssize_t done = 0, ret;

	if (ppos)
		return -ESPIPE;
	mutex_lock(&session->lock);
	if (session->disabled) {
		ret = -ENODEV;
		goto out;
	}
	td_count(session->td, TD_C_WRITES);
	ret = td_fault(&session->td->faults[TD_CALL_WRITE]);
	while (!ret && done < count) {
		ret = take(session, buf + done, count - done);
		if (ret > 0) {
			done += ret;
			ret = 0;
		}
	}
	if (ret)
		session->bad = true;
	td_add(session->td, TD_C_WRITTEN_BYTES, done);
out:
	mutex_unlock(&session->lock);
	return ret ? ret : done;
}

/* With the session's lock. */
int td_load_finish(struct td_session *session)
{
	return session->complete && !session->bad ? 0 : -EINVAL;
}

static int load_release(struct inode *inode, struct file *file)
{
	kvfree(file->private_data);
	return 0;
}

const struct file_operations td_load_fops = {
	.owner = THIS_MODULE,
	.write = load_write,
	.release = load_release,
};
