// SPDX-License-Identifier: GPL-2.0-only
/* The states of migration and the arcs between them, what can be asked about them, and the feature that is newer than the kernel. */
#include <linux/anon_inodes.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "session.h"

/* vfio.h of Linux 6.12 does not have it. */
#define FEATURE_MIG_PRECOPY_INFO_V2 12

static bool saves(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P ||
	       state == VFIO_DEVICE_STATE_STOP_COPY;
}

struct td_session *td_session_new(struct testdev *td, bool saving)
{
	struct td_session *session = kvzalloc(sizeof(*session), GFP_KERNEL_ACCOUNT);

	if (!session)
		return ERR_PTR(-ENOMEM);
	mutex_init(&session->lock);
	session->td = td;
	session->saving = saving;
	session->rounds = td->parameters.dirty_rounds;
	session->reinits = td->parameters.reinits;
	session->file = anon_inode_getfile("testdev", saving ? &td_save_fops : &td_load_fops, session,
					   saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(session->file)) {
		long error = PTR_ERR(session->file);

		kvfree(session);
		return ERR_PTR(error);
	}
	stream_open(session->file->f_inode, session->file);
	return session;
}

/* From here on the file gives errors, and does not touch the device. */
static void end_session(struct testdev *td)
{
	struct td_session *session = td->session;

	if (!session)
		return;
	mutex_lock(&session->lock);
	session->disabled = true;
	mutex_unlock(&session->lock);
	td->session = NULL;
	fput(session->file);
}

void td_migration_reset(struct testdev *td)
{
	end_session(td);
	td->migration = VFIO_DEVICE_STATE_RUNNING;
}

static struct file *begin_session(struct testdev *td, bool saving)
{
	struct td_session *session = td_session_new(td, saving);

	if (IS_ERR(session))
		return ERR_CAST(session);
	td->session = session;
	return get_file(session->file);
}

/* State and registers as they will be read. With td->lock, in a state in which they do not change any more. */
static void stop_session(struct testdev *td)
{
	struct td_session *session = td->session;

	mutex_lock(&session->lock);
	session->stopped = true;
	session->state = td->state;
	memcpy(session->state.page, page_address(td->shared), TD_BAR_SIZE);
	mutex_unlock(&session->lock);
}

static int finish_load(struct testdev *td)
{
	struct td_session *session = td->session;
	int error;

	if (td->parameters.load_final_ms)
		msleep_interruptible(td->parameters.load_final_ms);
	mutex_lock(&session->lock);
	error = td_load_finish(session);
	if (!error) {
		td->state = session->state;
		memcpy(page_address(td->shared), session->state.page, TD_BAR_SIZE);
		td->check = true;
	}
	mutex_unlock(&session->lock);
	td_count(td, error ? TD_C_LOAD_ERRORS : TD_C_LOADS);
	if (!error)
		end_session(td);
	return error;
}

/* One arc of those that the driver has to know, with the file that it brings, if any. */
static struct file *step(struct testdev *td, enum vfio_device_mig_state next)
{
	enum vfio_device_mig_state now = td->migration;
	struct file *file = NULL;
	int error;

	td_count(td, TD_C_ARCS);
	error = td_fault(&td->arcs[now][next]);
	if (!error && now == VFIO_DEVICE_STATE_RESUMING)
		error = finish_load(td);
	if (error) {
		if (td->parameters.error_after_fault) {
			end_session(td);
			td->migration = VFIO_DEVICE_STATE_ERROR;
		}
		return ERR_PTR(error);
	}
	if (next == VFIO_DEVICE_STATE_RESUMING)
		file = begin_session(td, false);
	else if (saves(next) && !saves(now))
		file = begin_session(td, true);
	else if (saves(now) && !saves(next))
		end_session(td);
	if (IS_ERR(file))
		return file;
	td->migration = next;
	if (next == VFIO_DEVICE_STATE_STOP_COPY)
		stop_session(td);
	td_irq_update(td);
	return file;
}

static struct file *set_state(struct vfio_device *vdev, enum vfio_device_mig_state wanted)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);
	struct file *file = NULL;

	mutex_lock(&td->lock);
	while (td->migration != wanted) {
		enum vfio_device_mig_state next;
		int error = vfio_mig_get_next_state(vdev, td->migration, wanted, &next);
		struct file *fresh = error ? ERR_PTR(error) : step(td, next);

		if (fresh && file)
			fput(file);
		if (fresh)
			file = fresh;
		if (IS_ERR(fresh))
			break;
	}
	mutex_unlock(&td->lock);
	return file;
}

static int get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);

	mutex_lock(&td->lock);
	*state = td->migration;
	mutex_unlock(&td->lock);
	return 0;
}

static int data_size(struct vfio_device *vdev, unsigned long *size)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);
	struct td_parameters *set = &td->parameters;
	int error;

	td_count(td, TD_C_DATA_SIZE);
	if (set->data_size_ms)
		msleep_interruptible(set->data_size_ms);
	mutex_lock(&td->lock);
	error = td_fault(&td->faults[TD_CALL_DATA_SIZE]);
	if (set->data_size != TD_TRUE) {
		*size = set->data_size;
	} else if (td->session && td->session->saving) {
		mutex_lock(&td->session->lock);
		*size = td_save_left(td->session);
		mutex_unlock(&td->session->lock);
	} else {
		*size = set->initial_size + set->final_size + sizeof(struct td_state) + 3 * sizeof(struct td_chunk);
	}
	mutex_unlock(&td->lock);
	return error;
}

const struct vfio_migration_ops td_migration_ops = {
	.migration_set_state = set_state,
	.migration_get_state = get_state,
	.migration_get_data_size = data_size,
};

int td_device_feature(struct vfio_device *vdev, u32 flags, void __user *arg, size_t argsz)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);
	int ret;

	if ((flags & VFIO_DEVICE_FEATURE_MASK) != FEATURE_MIG_PRECOPY_INFO_V2 ||
	    !(td->vdev.migration_flags & VFIO_MIGRATION_PRE_COPY))
		return -ENOTTY;
	ret = vfio_check_feature(flags, argsz, VFIO_DEVICE_FEATURE_SET, 0);
	if (ret == 1) {
		td->precopy_info_v2 = true;
		ret = 0;
	}
	return ret;
}
