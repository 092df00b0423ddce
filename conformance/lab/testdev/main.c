// SPDX-License-Identifier: GPL-2.0-only
/* The module, its one type of mediated device, and what a file of such a device can do. */
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "testdev.h"

static struct class *td_class;
static struct device *td_parent_device;
static struct mdev_parent td_parent;

int td_fault(struct td_fault *fault)
{
	if (!fault->times)
		return 0;
	if (fault->after) {
		fault->after--;
		return 0;
	}
	fault->times--;
	return -(int)fault->error;
}

static int td_open(struct vfio_device *vdev)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);
	int error;

	mutex_lock(&td->lock);
	td->precopy_info_v2 = false;
	td->migration = VFIO_DEVICE_STATE_RUNNING;
	td_pci_init(td);
	td_power_on(td);
	td->open = true;
	mutex_unlock(&td->lock);
	error = td_dma_start(td);
	if (error)
		td->open = false;
	return error;
}

static void td_close(struct vfio_device *vdev)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);

	td_dma_stop(td);
	td_irq_close(td);
	mutex_lock(&td->lock);
	td_migration_reset(td);
	td->open = false;
	mutex_unlock(&td->lock);
}

static long td_info(struct testdev *td, unsigned long arg)
{
	struct vfio_device_info info;
	size_t size = offsetofend(struct vfio_device_info, num_irqs);

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI;
	if (td->parameters.reset_offered)
		info.flags |= VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}

static long td_reset(struct testdev *td)
{
	if (!td->parameters.reset_offered)
		return -ENOTTY;
	mutex_lock(&td->lock);
	td_migration_reset(td);
	td_power_on(td);
	mutex_unlock(&td->lock);
	td_count(td, TD_C_RESETS);
	return 0;
}

static long td_ioctl(struct vfio_device *vdev, unsigned int command, unsigned long arg)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);

	switch (command) {
	case VFIO_DEVICE_GET_INFO: return td_info(td, arg);
	case VFIO_DEVICE_GET_REGION_INFO: return td_region_info(td, arg);
	case VFIO_DEVICE_GET_IRQ_INFO: return td_irq_info(td, arg);
	case VFIO_DEVICE_SET_IRQS: return td_set_irqs(td, arg);
	case VFIO_DEVICE_RESET: return td_reset(td);
	default: return -ENOTTY;
	}
}

static int td_init(struct vfio_device *vdev)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);

	mutex_init(&td->lock);
	td_irq_init(td);
	td_defaults(&td->parameters);
	td->shared = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!td->shared)
		return -ENOMEM;
	vdev->migration_flags = td->parameters.migration_flags;
	vdev->mig_ops = &td_migration_ops;
	vdev->log_ops = &td_log_ops;
	return 0;
}

static void td_release(struct vfio_device *vdev)
{
	struct testdev *td = container_of(vdev, struct testdev, vdev);

	__free_page(td->shared);
}

static const struct vfio_device_ops td_ops = {
	.name = "testdev",
	.init = td_init,
	.release = td_release,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
	.open_device = td_open,
	.close_device = td_close,
	.read = td_region_read,
	.write = td_region_write,
	.ioctl = td_ioctl,
	.mmap = td_region_mmap,
	.device_feature = td_device_feature,
};

static int td_probe(struct mdev_device *mdev)
{
	struct testdev *td = vfio_alloc_device(testdev, vdev, &mdev->dev, &td_ops);
	int error;

	if (IS_ERR(td))
		return PTR_ERR(td);
	td->mdev = mdev;
	dev_set_drvdata(&mdev->dev, td);
	error = vfio_register_emulated_iommu_dev(&td->vdev);
	if (error)
		vfio_put_device(&td->vdev);
	return error;
}

static void td_remove(struct mdev_device *mdev)
{
	struct testdev *td = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&td->vdev);
	vfio_put_device(&td->vdev);
}

static struct mdev_type td_type = { .sysfs_name = "pci", .pretty_name = "device for tests of live migration" };
static struct mdev_type *td_types[] = { &td_type };

static struct mdev_driver td_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = 16,
	.driver = {
		.name = "testdev",
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
		.dev_groups = td_groups,
	},
	.probe = td_probe,
	.remove = td_remove,
};

static int __init td_module_init(void)
{
	int error;

	td_class = class_create("testdev");
	if (IS_ERR(td_class))
		return PTR_ERR(td_class);
	td_parent_device = device_create(td_class, NULL, MKDEV(0, 0), NULL, "testdev");
	if (IS_ERR(td_parent_device)) {
		error = PTR_ERR(td_parent_device);
		goto no_device;
	}
	error = mdev_register_driver(&td_driver);
	if (error)
		goto no_driver;
	error = mdev_register_parent(&td_parent, td_parent_device, &td_driver, td_types, ARRAY_SIZE(td_types));
	if (!error)
		return 0;
	mdev_unregister_driver(&td_driver);
no_driver:
	device_unregister(td_parent_device);
no_device:
	class_destroy(td_class);
	return error;
}

static void __exit td_module_exit(void)
{
	mdev_unregister_parent(&td_parent);
	mdev_unregister_driver(&td_driver);
	device_unregister(td_parent_device);
	class_destroy(td_class);
}

module_init(td_module_init);
module_exit(td_module_exit);
MODULE_DESCRIPTION("Mediated device for tests of live migration");
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS(IOMMUFD);
