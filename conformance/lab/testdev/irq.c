// SPDX-License-Identifier: GPL-2.0-only
/*
 * Interrupts. INTx is level triggered: it is signalled while a pending bit is set, and masks itself each time, as VFIO's
 * interface wants it. MSI and MSI-X are signalled once each.
 */
#include <linux/uaccess.h>

#include "testdev.h"

void td_irq_init(struct testdev *td)
{
	spin_lock_init(&td->irq_lock);
	td->msi_index = -1;
}

static void signal(struct testdev *td, struct eventfd_ctx *where)
{
	eventfd_signal(where);
	td_count(td, TD_C_SIGNALLED);
}

/* With irq_lock. */
static void update_locked(struct testdev *td)
{
	if (!td_running(td->migration))
		return;
	if (td->intx && td->state.pending && !td->masked && !td_intx_disabled(td)) {
		td->masked = true;
		signal(td, td->intx);
	}
	for (unsigned int vector = 0; vector < TD_VECTORS; vector++) {
		if (td->msi_late & BIT(vector) && td->msi[vector]) {
			td->msi_late &= ~BIT(vector);
			signal(td, td->msi[vector]);
		}
	}
}

void td_irq_update(struct testdev *td)
{
	unsigned long flags;

	spin_lock_irqsave(&td->irq_lock, flags);
	update_locked(td);
	spin_unlock_irqrestore(&td->irq_lock, flags);
}

/* With td->lock. */
void td_irq_raise(struct testdev *td, u32 vector)
{
	unsigned long flags;

	if (vector >= TD_VECTORS)
		return;
	td->state.raised++;
	td_count(td, TD_C_RAISED);
	spin_lock_irqsave(&td->irq_lock, flags);
	if (td->msi_index >= 0)
		td->msi_late |= BIT(vector);
	else
		td->state.pending |= BIT(vector);
	update_locked(td);
	spin_unlock_irqrestore(&td->irq_lock, flags);
}

static unsigned int vectors(struct testdev *td, unsigned int index)
{
	switch (index) {
	case VFIO_PCI_INTX_IRQ_INDEX: return td->parameters.interrupts & 1 ? 1 : 0;
	case VFIO_PCI_MSI_IRQ_INDEX: return td->parameters.interrupts & 2 ? TD_VECTORS : 0;
	case VFIO_PCI_MSIX_IRQ_INDEX: return td->parameters.interrupts & 4 ? TD_VECTORS : 0;
	default: return 0;
	}
}

long td_irq_info(struct testdev *td, unsigned long arg)
{
	struct vfio_irq_info info;
	size_t size = offsetofend(struct vfio_irq_info, count);

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size || info.index > VFIO_PCI_MSIX_IRQ_INDEX)
		return -EINVAL;
	info.count = vectors(td, info.index);
	info.flags = VFIO_IRQ_INFO_EVENTFD;
	if (info.index == VFIO_PCI_INTX_IRQ_INDEX)
		info.flags |= VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
	else
		info.flags |= VFIO_IRQ_INFO_NORESIZE;
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}

static void set_masked(struct testdev *td, bool masked)
{
	unsigned long flags;

	spin_lock_irqsave(&td->irq_lock, flags);
	td->masked = masked;
	update_locked(td);
	spin_unlock_irqrestore(&td->irq_lock, flags);
}

/* An eventfd unmasks INTx. In a thread, because an eventfd is not signalled from within another. */
static void unmask_thread(void *opaque, void *unused)
{
	set_masked(opaque, false);
}

static void replace(struct testdev *td, struct eventfd_ctx **where, struct eventfd_ctx *what)
{
	struct eventfd_ctx *old;
	unsigned long flags;

	spin_lock_irqsave(&td->irq_lock, flags);
	old = *where;
	*where = what;
	spin_unlock_irqrestore(&td->irq_lock, flags);
	if (old)
		eventfd_ctx_put(old);
}

static void disable_msi(struct testdev *td)
{
	for (unsigned int vector = 0; vector < TD_VECTORS; vector++)
		replace(td, &td->msi[vector], NULL);
	td->msi_index = -1;
	td->msi_late = 0;
}

static void disable_intx(struct testdev *td)
{
	vfio_virqfd_disable(&td->unmask);
	replace(td, &td->intx, NULL);
	td->masked = false;
}

void td_irq_close(struct testdev *td)
{
	disable_intx(td);
	disable_msi(td);
}

/* Whether the vector is meant: data may be nothing, a flag or a descriptor. */
static bool meant(const struct vfio_irq_set *set, const void *data, unsigned int at)
{
	return set->flags & VFIO_IRQ_SET_DATA_NONE || ((const u8 *)data)[at];
}

static long set_eventfd(struct testdev *td, struct eventfd_ctx **where, s32 descriptor)
{
	struct eventfd_ctx *context = NULL;

	if (descriptor >= 0) {
		context = eventfd_ctx_fdget(descriptor);
		if (IS_ERR(context))
			return PTR_ERR(context);
	}
	replace(td, where, context);
	return 0;
}

static long set_intx(struct testdev *td, const struct vfio_irq_set *set, const void *data)
{
	bool eventfd = set->flags & VFIO_IRQ_SET_DATA_EVENTFD;
	long error;

	switch (set->flags & VFIO_IRQ_SET_ACTION_TYPE_MASK) {
	case VFIO_IRQ_SET_ACTION_MASK:
		if (eventfd)
			return -EINVAL;
		if (meant(set, data, 0))
			set_masked(td, true);
		return 0;
	case VFIO_IRQ_SET_ACTION_UNMASK:
		if (!eventfd) {
			if (meant(set, data, 0))
				set_masked(td, false);
			return 0;
		}
		if (*(const s32 *)data < 0) {
			vfio_virqfd_disable(&td->unmask);
			return 0;
		}
		return vfio_virqfd_enable(td, NULL, unmask_thread, NULL, &td->unmask, *(const s32 *)data);
	case VFIO_IRQ_SET_ACTION_TRIGGER:
		if (!eventfd && !set->count) {
			disable_intx(td);
			return 0;
		}
		if (!eventfd) {
			if (td->intx && meant(set, data, 0))
				signal(td, td->intx);
			return 0;
		}
		if (td->msi_index >= 0)
			return -EINVAL;
		error = set_eventfd(td, &td->intx, *(const s32 *)data);
		if (!error)
			td_irq_update(td);
		return error;
	default: return -EINVAL;
	}
}

static long set_msi(struct testdev *td, const struct vfio_irq_set *set, const void *data)
{
	long error = 0;

	if ((set->flags & VFIO_IRQ_SET_ACTION_TYPE_MASK) != VFIO_IRQ_SET_ACTION_TRIGGER)
		return -EINVAL;
	if (set->flags & VFIO_IRQ_SET_DATA_NONE && !set->count) {
		if (td->msi_index == (int)set->index)
			disable_msi(td);
		return 0;
	}
	if (!(set->flags & VFIO_IRQ_SET_DATA_EVENTFD)) {
		for (unsigned int i = 0; i < set->count; i++)
			if (td->msi[set->start + i] && meant(set, data, i))
				signal(td, td->msi[set->start + i]);
		return 0;
	}
	if (td->intx || (td->msi_index >= 0 && td->msi_index != (int)set->index))
		return -EINVAL;
	for (unsigned int i = 0; i < set->count && !error; i++)
		error = set_eventfd(td, &td->msi[set->start + i], ((const s32 *)data)[i]);
	td->msi_index = set->index;
	td_irq_update(td);
	return error;
}

long td_set_irqs(struct testdev *td, unsigned long arg)
{
	size_t size = offsetofend(struct vfio_irq_set, count), data_size = 0;
	s32 data[TD_VECTORS] = {};
	struct vfio_irq_set set;
	long error;

	if (copy_from_user(&set, (void __user *)arg, size))
		return -EFAULT;
	if (set.index > VFIO_PCI_MSIX_IRQ_INDEX)
		return -EINVAL;
	error = vfio_set_irqs_validate_and_prepare(&set, vectors(td, set.index), VFIO_PCI_NUM_IRQS, &data_size);
	if (error)
		return error;
	if (data_size > sizeof(data) || copy_from_user(data, (void __user *)(arg + size), data_size))
		return -EFAULT;
	mutex_lock(&td->lock);
	error = set.index == VFIO_PCI_INTX_IRQ_INDEX ? set_intx(td, &set, data) : set_msi(td, &set, data);
	mutex_unlock(&td->lock);
	return error;
}
