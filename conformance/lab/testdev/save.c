// SPDX-License-Identifier: GPL-2.0-only
/* Reading the device's state. */
#include <linux/fs.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "session.h"

/* Of a device that never ends. */
#define FILL_SIZE (1 << 20)

static void begin_chunk(struct td_session *session, enum td_kind kind, u64 length)
{
	session->chunk.magic = cpu_to_le64(TD_CHUNK_MAGIC);
	session->chunk.kind = cpu_to_le32(kind);
	session->chunk.number = cpu_to_le32(session->number++);
	session->chunk.length = cpu_to_le64(length);
	session->passed = 0;
}

/* Begins the next chunk that there is now, if there is one. */
static bool next_chunk(struct td_session *session)
{
	struct testdev *td = session->td;
	struct td_parameters *set = &td->parameters;

	if (!session->initial_done) {
		session->initial_done = true;
		if (set->initial_size) {
			begin_chunk(session, TD_INITIAL, set->initial_size);
			return true;
		}
	}
	if (!session->stopped) {
		if (session->pause)
			return false;
		if (session->rounds) {
			session->rounds--;
			session->pause = true;
			begin_chunk(session, TD_DIRTY, set->dirty_size);
			return true;
		}
		if (session->reinits) {
			session->reinits--;
			session->pause = true;
			session->reinit = td->precopy_info_v2;
			/* Who has not asked for it must not see initial data grow. */
			begin_chunk(session, td->precopy_info_v2 ? TD_INITIAL : TD_DIRTY, set->initial_size);
			td_count(td, TD_C_REINITS);
			return true;
		}
		return false;
	}
	if (set->endless) {
		begin_chunk(session, TD_FILL, FILL_SIZE);
		return true;
	}
	if (!session->final_done) {
		session->final_done = true;
		if (set->final_size) {
			begin_chunk(session, TD_FINAL, set->final_size);
			return true;
		}
	}
	if (!session->state_done) {
		session->state_done = true;
		begin_chunk(session, TD_STATE, sizeof(struct td_state));
		td_count(td, TD_C_SAVES);
		return true;
	}
	return false;
}

/* What will have been read when all has been, with what is known now. */
u64 td_save_left(struct td_session *session)
{
	struct td_parameters *set = &session->td->parameters;
	u64 left = td_chunk_left(session);

	if (!session->initial_done && set->initial_size)
		left += sizeof(struct td_chunk) + set->initial_size;
	if (!session->final_done && set->final_size)
		left += sizeof(struct td_chunk) + set->final_size;
	if (!session->state_done)
		left += sizeof(struct td_chunk) + sizeof(struct td_state);
	return left;
}

/* A step of any chunk, apart from the words that tell where it belongs. */
static u64 pattern[TD_STEP / 8];

static bool emit_contents(struct td_session *session, char __user *to, u64 at, size_t count)
{
	for (u64 here = at; here < at + count;) {
		u64 step = here / TD_STEP, within = here % TD_STEP, words[TD_WORDS];
		size_t piece;

		if (within < sizeof(words)) {
			for (unsigned int word = 0; word < TD_WORDS; word++)
				words[word] = td_word(&session->chunk, step, word);
			piece = min_t(u64, sizeof(words) - within, at + count - here);
			if (copy_to_user(to + (here - at), (u8 *)words + within, piece))
				return false;
		} else {
			piece = min_t(u64, TD_STEP - within, at + count - here);
			if (copy_to_user(to + (here - at), (u8 *)pattern + within, piece))
				return false;
		}
		here += piece;
	}
	return true;
}

/* Up to `count` bytes of the chunk under way. */
static ssize_t emit(struct td_session *session, char __user *to, size_t count)
{
	bool ok;

	if (session->passed < sizeof(session->chunk)) {
		count = min_t(u64, count, sizeof(session->chunk) - session->passed);
		ok = !copy_to_user(to, (u8 *)&session->chunk + session->passed, count);
	} else {
		u64 at = session->passed - sizeof(session->chunk);

		count = min_t(u64, count, td_chunk_left(session));
		if (session->chunk.kind == cpu_to_le32(TD_STATE))
			ok = !copy_to_user(to, (u8 *)&session->state + at, count);
		else
			ok = emit_contents(session, to, at, count);
	}
	if (!ok)
		return -EFAULT;
	session->passed += count;
	return count;
}

static ssize_t save_read(struct file *file, char __user *buf, size_t count, loff_t *ppos)
{
	struct td_session *session = file->private_data;
	struct testdev *td;
	ssize_t done = 0, ret = 0;

	if (ppos)
		return -ESPIPE;
	if (!pattern[TD_WORDS])
		for (unsigned int word = TD_WORDS; word < ARRAY_SIZE(pattern); word++)
			pattern[word] = td_word(NULL, 0, word);
	mutex_lock(&session->lock);
	if (session->disabled) {
		ret = -ENODEV;
		goto out;
	}
	td = session->td;
	td_count(td, TD_C_READS);
	ret = td_fault(&td->faults[TD_CALL_READ]);
	while (!ret && done < count) {
		if (!td_chunk_left(session)) {
			/* While the guest runs, a read ends with a chunk, so that what is initial and what is not come apart. */
			if (done && !session->stopped)
				break;
			if (!next_chunk(session))
				break;
		}
		ret = emit(session, buf + done, count - done);
		if (ret > 0) {
			done += ret;
			ret = 0;
		}
	}
	td_add(td, TD_C_READ_BYTES, done);
	if (!ret && !done && !session->stopped && count) {
		session->pause = false;
		if (td->parameters.drain_enomsg)
			ret = -ENOMSG;
	}
out:
	mutex_unlock(&session->lock);
	return done ? done : ret;
}

static long precopy_info(struct td_session *session, unsigned long arg)
{
	struct testdev *td = session->td;
	struct td_parameters *set = &td->parameters;
	size_t size = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct vfio_precopy_info info;
	bool initial;
	long error;

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size)
		return -EINVAL;
	if (session->stopped)
		return -EINVAL;
	td_count(td, TD_C_PRECOPY_INFO);
	error = td_fault(&td->faults[TD_CALL_PRECOPY_INFO]);
	if (error)
		return error;
	if (!td_chunk_left(session) && !next_chunk(session))
		session->pause = false;
	initial = session->chunk.kind == cpu_to_le32(TD_INITIAL);
	info.initial_bytes = initial ? td_chunk_left(session) : 0;
	info.dirty_bytes = initial ? 0 : td_chunk_left(session);
	if (set->initial_bytes != TD_TRUE)
		info.initial_bytes = set->initial_bytes;
	if (set->dirty_bytes != TD_TRUE)
		info.dirty_bytes = set->dirty_bytes;
	/* Without the newer feature the flags come back as they were. */
	if (td->precopy_info_v2) {
		info.flags = session->reinit ? 1 : 0;
		session->reinit = false;
	}
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}

static long save_ioctl(struct file *file, unsigned int command, unsigned long arg)
{
	struct td_session *session = file->private_data;
	long ret;

	if (command != VFIO_MIG_GET_PRECOPY_INFO)
		return -ENOTTY;
	mutex_lock(&session->lock);
	ret = session->disabled ? -ENODEV : precopy_info(session, arg);
	mutex_unlock(&session->lock);
	return ret;
}

static int save_release(struct inode *inode, struct file *file)
{
	kvfree(file->private_data);
	return 0;
}

const struct file_operations td_save_fops = {
	.owner = THIS_MODULE,
	.read = save_read,
	.unlocked_ioctl = save_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = save_release,
};
